"""Settings that exist elsewhere and are refused here, each with its reason."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

SAMPLING_KEYS = {
    "top_p", "top_k", "min_p", "top_a", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "length_penalty", "no_repeat_ngram_size", "logit_bias", "bad_words",
    "min_tokens", "min_new_tokens",
}  # fmt: skip
"""Settings that cut or bend the distribution a response is sampled from."""

_SAMPLER = "the sampler would differ from the policy whose logprobs are trained on"
_MODEL = "the trainer says which model the engine runs and sends its weights"
_ROUTES = "the trainer talks to its engines over plain HTTP, at an address of its own, without a key"
_GROUP = "the number of an engine's workers is what weights are sent by; set rollout.vllm.server.tensor_parallel_size"
_PROTOCOL = "the trainer depends on what it sets there"
SERVER_OPTIONS = {
    **dict.fromkeys(
        ["generation-config", "override-generation-config", "logits-processors", "watermark-config",
         "diffusion-config"], _SAMPLER
    ),
    "logprobs-mode": "logprobs have to be those of the distribution that was sampled from, at its temperature",
    **dict.fromkeys(
        ["speculative-config", "spec-method", "spec-model", "spec-tokens"],
        "speculative decoding has not been checked here: a draft model gets no new weights, and not every method keeps "
        "the policy's distribution",
    ),
    **dict.fromkeys(
        ["quantization", "quantization-config", "enable-lora", "lora-modules"],
        "weights arrive from the learner as they are, and would not fit such layers",
    ),
    **dict.fromkeys(
        ["model", "served-model-name", "runner", "convert", "hf-config-path", "config-format",
         "model-class-overrides", "hf-overrides"], _MODEL
    ),
    "load-format": "models are read from safetensors only",
    "dtype": "set model.dtype",
    "trust-remote-code": "set model.trust_remote_code",
    "max-model-len": "it follows from data.max_prompt_tokens and the longest response",
    **dict.fromkeys(
        ["host", "port", "uds", "grpc", "headless", "api-key", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs",
         "ssl-cert-reqs", "root-path"], _ROUTES
    ),
    **dict.fromkeys(
        ["tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "data-parallel-size-local",
         "prefill-context-parallel-size", "nnodes", "node-rank"], _GROUP
    ),
    **dict.fromkeys(
        ["skip-tokenizer-init", "tokens-only", "enable-scale-out", "weight-transfer-config", "worker-extension-cls",
         "worker-cls"], _PROTOCOL
    ),
    "config": "a file could set any other refused option; write the options themselves",
}  # fmt: skip
"""Long options of vLLM's server, without dashes -> why the trainer's own value must stand."""
_SHORT = {
    "-sc": "speculative-config", "-q": "quantization", "-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size", "-dpl": "data-parallel-size-local", "-pcp": "prefill-context-parallel-size",
    "-n": "nnodes", "-r": "node-rank", "-dc": "diffusion-config",
}  # fmt: skip
# vLLM takes an option's unambiguous beginning for the option. This one is an option of its own.
_ALLOWED = {"watermark"}


def check_server_options(options: str, key: str = "rollout.vllm.server.options") -> None:
    """Refuse options of vLLM's server that would change what is sampled or break the protocol. Raises ValueError."""
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ValueError(f"{key}: {options!r} cannot be split into words ({error}); check its quotes") from error
    for word in words:
        name = _refused(word, list(SERVER_OPTIONS))
        if name is not None:
            raise ValueError(f"{key}: {word.split('=')[0]} is refused: {SERVER_OPTIONS[name]}")


def _refused(word: str, names: Sequence[str]) -> str | None:
    """The refused option that vLLM would take a word for, if any."""
    if not word.startswith("--"):
        # argparse takes `-qfp8` for `-q fp8`, but only of options of one letter.
        return _SHORT.get(word.split("=")[0]) or _SHORT.get(word[:2])
    # vLLM takes underscores, `--option=value` and `--option.key value`; switches have a `--no-` form.
    given = re.split(r"[=.]", word[2:].replace("_", "-"))[0].removeprefix("no-")
    if given in names:
        return given
    return next((name for name in names if given and given not in _ALLOWED and name.startswith(given)), None)
