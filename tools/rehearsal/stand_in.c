/* A stand-in for an NVIDIA GPU and its libraries, for PyTorch's CUDA build on a machine that has none.
 *
 * Loaded before CUDA's runtime, driver, cuBLAS and NCCL, it answers in their place. Memory is taken and given back for
 * real, as addresses, up to what the card has. Kernels are compiled and loaded by those who make them, but their launches
 * do nothing: nothing is computed, and what is copied back from the device is zero. The functions that PyTorch needs and
 * that are not here are added as ones that do nothing and report success (tools/rehearsal/__main__.py).
 *
 * CARD in the environment is "name|major|minor|multiprocessors|bytes|bytes of shared memory of a block|threads of a
 * multiprocessor"; CARDS is how many there are. Names and numbers of attributes: cuda.h, driver_types.h.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#undef cudaGetDeviceProperties

/* ------------------------------------------------------------------------------------------------------ the card */

static struct { char name[64]; int major, minor, processors; size_t bytes; int shared, threads; } card;
static __thread int current;
static const size_t CONTEXT = 500u << 20; /* what a process takes of a real card before its first tensor */

__attribute__((constructor)) static void read_card(void) {
    const char *text = getenv("CARD");
    if (text)
        sscanf(text, "%63[^|]|%d|%d|%d|%zu|%d|%d", card.name, &card.major, &card.minor, &card.processors, &card.bytes,
               &card.shared, &card.threads);
}

static int cards(void) {
    const char *text = getenv("CARDS");
    return text ? atoi(text) : 1;
}

static int attribute(int which) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return card.shared;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 2000000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 10000000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 384;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return card.processors;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return card.threads;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return card.major;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return card.minor;
    default: return 0;
    }
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, card.name);
    p->major = card.major, p->minor = card.minor;
    p->totalGlobalMem = card.bytes;
    p->multiProcessorCount = card.processors, p->maxThreadsPerMultiProcessor = card.threads;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = card.shared;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 4 << 20, p->memoryBusWidth = 384, p->unifiedAddressing = p->concurrentKernels = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { return *value = attribute(which), 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { return *value = attribute(which), 0; }
cudaError_t cudaGetDeviceCount(int *n) { return *n = cards(), 0; }
cudaError_t cudaGetDevice(int *device) { return *device = current, 0; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cards()) return cudaErrorInvalidDevice;
    return current = device, 0;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, 0; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { return snprintf(text, size, "0000:01:00.0"), 0; }
CUresult cuDeviceGetCount(int *n) { return *n = cards(), 0; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, 0; }
CUresult cuDeviceGetName(char *text, int size, CUdevice device) { return snprintf(text, size, "%s", card.name), 0; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)&card, 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&card, 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = current, 0; }

/* -------------------------------------------------------------------------------------------------------- memory */

enum { HOST = 1, DEVICE = 2 };
static struct { char *start; size_t size; int kind; } blocks[1 << 16];
static int n_blocks;
static size_t taken;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t take(void **place, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    int fits = kind == HOST || taken + size + CONTEXT <= card.bytes;
    /* of the device only addresses: whoever read or wrote there would be ended */
    int access = kind == HOST ? PROT_READ | PROT_WRITE : PROT_NONE;
    *place = fits ? mmap(0, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : MAP_FAILED;
    if (*place == MAP_FAILED) *place = NULL;
    else {
        blocks[n_blocks].start = *place, blocks[n_blocks].size = size, blocks[n_blocks++].kind = kind;
        taken += kind == DEVICE ? size : 0;
    }
    pthread_mutex_unlock(&lock);
    return *place ? cudaSuccess : cudaErrorMemoryAllocation;
}

static cudaError_t give(void *place) {
    pthread_mutex_lock(&lock);
    for (int i = 0; place && i < n_blocks; i++)
        if (blocks[i].start == place) {
            munmap(place, blocks[i].size);
            taken -= blocks[i].kind == DEVICE ? blocks[i].size : 0;
            blocks[i] = blocks[--n_blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static int kind_of(const void *place) {
    int kind = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; !kind && i < n_blocks; i++)
        if ((char *)place >= blocks[i].start && (char *)place < blocks[i].start + blocks[i].size) kind = blocks[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

/* What went to the device last comes back as it was, for DDP: it sends a list around and reads it again */
static cudaError_t copy(void *to, const void *from, size_t size) {
    static char last[1 << 16], *last_place;
    static size_t last_size;
    if (kind_of(to) == DEVICE) {
        last_place = kind_of(from) != DEVICE && size <= sizeof last ? to : NULL, last_size = size;
        if (last_place) memcpy(last, from, size);
    } else if (kind_of(from) != DEVICE) memmove(to, from, size);
    else if (from == last_place && size == last_size) memcpy(to, last, size);
    else memset(to, 0, size);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **place, size_t size) { return take(place, size, DEVICE); }
cudaError_t cudaFree(void *place) { return give(place); }
cudaError_t cudaHostAlloc(void **place, size_t size, unsigned flags) { return take(place, size, HOST); }
cudaError_t cudaFreeHost(void *place) { return give(place); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    return *total = card.bytes, *free = card.bytes - CONTEXT - taken, 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return copy(to, from, size); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) copy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *place) {
    memset(a, 0, sizeof *a);
    a->type = kind_of(place), a->device = current, a->devicePointer = a->hostPointer = (void *)place;
    return cudaSuccess;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr place) {
    return *(CUdeviceptr *)value = which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? place : 0, 0;
}
cudaError_t cudaGetSymbolAddress(void **place, const void *symbol) {
    static char anything[1 << 20];
    return *place = anything, 0;
}

/* ---------------------------------------------------------------------------------- streams, events, kernels */

static size_t next_handle = 4096;
static int new_handle(void *place) { return *(size_t *)place = next_handle += 16, 0; }

static double milliseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return new_handle(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { return *status = 0, 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n) {
    return *status = 0, 0;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
    return call(stream, 0, data), 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) { return call(data), 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = (cudaEvent_t)calloc(1, sizeof(double)), 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return *(double *)event = milliseconds(), 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), 0; }
cudaError_t cudaEventElapsedTime(float *elapsed, cudaEvent_t from, cudaEvent_t to) {
    double passed = *(double *)to - *(double *)from;
    return *elapsed = passed > 0.01 ? passed : 0.01, 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 10 * card.major + (card.major == 8 && card.minor == 9 ? 6 : card.minor); /* wheels */
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int size, size_t shared) { return *n = 2, 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int size, size_t shared,
                                                                   unsigned flags) {
    return *n = 2, 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int size, size_t shared) { return *n = 2, 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) { return *n = 1, 0; }
CUresult cuModuleLoad(CUmodule *module, const char *path) { return new_handle(module); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return new_handle(module); }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return new_handle(module);
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { return new_handle(function); }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0, 0;
}
void **__cudaRegisterFatBinary(void *image) {
    static void *handle;
    return &handle;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    grid->x = grid->y = grid->z = block->x = block->y = block->z = 1;
    return *shared = 0, *(void **)stream = NULL, 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    char second[256];
    snprintf(second, sizeof second, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, second);
    if (!*function) *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}
const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "error"; }
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "error", 0; }

/* -------------------------------------------------------------------------------------------------- cuBLAS, NCCL */

int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasLtCreate(void **handle) { return new_handle(handle); }
int cublasLtMatmulDescCreate(void **descriptor, int compute, int scale) { return new_handle(descriptor); }
int cublasLtMatrixLayoutCreate(void **layout) { return new_handle(layout); }
int cublasLtMatmulPreferenceCreate(void **preference) { return new_handle(preference); }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, char *results, int *found) {
    return memset(results, 0, 96), *found = 1, 0; /* one result, sizeof(cublasLtMatmulHeuristicResult_t) */
}

typedef struct { char bytes[128]; } UniqueId;
static int communicators[64][2], n_communicators; /* size, rank */

int ncclGetVersion(int *version) { return *version = 22900, 0; }
int ncclGetUniqueId(UniqueId *id) { return memset(id, 1, sizeof *id), 0; }
int ncclCommInitRankConfig(void **communicator, int size, UniqueId id, int rank, void *config) {
    communicators[n_communicators][0] = size, communicators[n_communicators][1] = rank;
    return *communicator = communicators[n_communicators++], 0;
}
int ncclCommInitRank(void **communicator, int size, UniqueId id, int rank) {
    return ncclCommInitRankConfig(communicator, size, id, rank, NULL);
}
int ncclCommCount(int *communicator, int *size) { return *size = communicator[0], 0; }
int ncclCommUserRank(int *communicator, int *rank) { return *rank = communicator[1], 0; }
int ncclCommCuDevice(void *communicator, int *device) { return *device = current, 0; }
int ncclCommGetAsyncError(void *communicator, int *error) { return *error = 0; }
const char *ncclGetErrorString(int error) { return "error"; }
const char *ncclGetLastError(void *communicator) { return ""; }
