"""One-call switches that make other libraries compute their token logprobs with these kernels.

Each module imports the library it is named after, and nothing else in tcopd_kernels imports these modules.
"""
