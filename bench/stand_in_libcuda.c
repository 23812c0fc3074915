/* A CUDA driver without a GPU: modules load, launches are checked and counted, nothing is computed.
 *
 * Only the calls that Triton's host code makes are here. What a real driver would refuse is refused: a launch outside
 * the limits of compute capability 8.0 and later, a tensor map that the hardware cannot encode. STAND_IN_CAPABILITY
 * (80, 90, 100) chooses the GPU that it speaks for.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define MAX_FUNCTIONS 4096
#define MAX_LAUNCHES 65536

static char *names[MAX_FUNCTIONS];
static int dynamic_shared[MAX_FUNCTIONS];
static int function_count = 0;

typedef struct {
  int function;
  unsigned grid[3];
  unsigned threads;
  unsigned shared;
} Launch;
static Launch launches[MAX_LAUNCHES];
static int launch_count = 0;

static int capability(void) {
  const char *text = getenv("STAND_IN_CAPABILITY");
  return text ? atoi(text) : 90;
}

static int shared_per_block(void) { return capability() < 90 ? 163 << 10 : 227 << 10; }

/* What Python asks afterwards. */
int stand_in_launch_count(void) { return launch_count; }
const char *stand_in_launch_name(int i) { return names[launches[i].function]; }
unsigned stand_in_launch_programs(int i) {
  return launches[i].grid[0] * launches[i].grid[1] * launches[i].grid[2];
}
unsigned stand_in_launch_threads(int i) { return launches[i].threads; }
unsigned stand_in_launch_shared(int i) { return launches[i].shared; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_per_block(); break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = capability() < 90 ? 108 : 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "error of the stand-in driver";
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4) != 0)
    return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

/* A function is its number, from 1. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (function_count == MAX_FUNCTIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  names[function_count] = strdup(name);
  dynamic_shared[function_count] = 48 << 10;
  *function = (CUfunction)(size_t)(++function_count);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > shared_per_block())
    return CUDA_ERROR_INVALID_VALUE;
  dynamic_shared[(size_t)function - 1] = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* Limits from the driver API's reference, cuTensorMapEncodeTiled. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  int bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ ||
                      type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                  ? 4
                  : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 0;
  unsigned swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                              : 0;
  if (!bytes || rank < 1 || rank > 5 || (size_t)address % 16)
    return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * bytes % 16 || (swizzled && box[0] * bytes > swizzled))
    return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; i++)
    if (dims[i] < 1 || dims[i] > 1ull << 32 || box[i] < 1 || box[i] > 256 || element_strides[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i + 1 < rank; i++)
    if (strides[i] % 16 || strides[i] >= 1ull << 40)
      return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  size_t f = (size_t)function - 1;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (f >= (size_t)function_count || !params || launch_count == MAX_LAUNCHES)
    return CUDA_ERROR_INVALID_HANDLE;
  if (config->gridDimX < 1 || config->gridDimX > 2147483647u || config->gridDimY < 1 || config->gridDimY > 65535 ||
      config->gridDimZ < 1 || config->gridDimZ > 65535 || threads < 32 || threads > 1024)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > (unsigned)dynamic_shared[f])
    return CUDA_ERROR_INVALID_VALUE;
  Launch *launch = &launches[launch_count++];
  launch->function = (int)f;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->threads = threads;
  launch->shared = config->sharedMemBytes;
  return CUDA_SUCCESS;
}
