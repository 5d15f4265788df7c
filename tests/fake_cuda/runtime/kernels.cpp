// Kernels, and the products of cuBLAS: they are counted or recorded, and compute nothing.
#include <cstdlib>
#include <cstring>

#include "shared.h"

static cudaError_t launch(cudaStream_t stream) {
    {
        LOCKED;
        auto capture = stream_of(stream).capture;
        if (capture && fails("capture"))
            return noted(invalidate(*capture, "what FAKE_CUDA_FAIL says", cudaErrorStreamCaptureUnsupported));
    }
    return perform(stream, "kernel", [] {});
}

// --- Launches, as the compiler writes them -------------------------------------------------------------------------

struct Configuration {
    dim3 grid, block;
    size_t shared_memory;
    cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
    configurations.push_back({grid, block, shared_memory, stream});
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
    Configuration& one = configurations.back();
    *grid = one.grid;
    *block = one.block;
    *shared_memory = one.shared_memory;
    *(cudaStream_t*)stream = one.stream;
    configurations.pop_back();
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch(stream);
}

EXPORT cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return launch(stream); }

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void*, void**) {
    return launch(configuration->stream);
}

EXPORT cudaError_t __cudaGetKernel(void** kernel, const void* function) {
    *kernel = (void*)function;
    return cudaSuccess;
}

EXPORT void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 75;
    attributes->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* number, const void*, int, size_t) {
    *number = 2;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* number, const void*, int, size_t,
                                                                          unsigned) {
    *number = 2;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char symbol[1 << 20];
    *address = symbol;
    return cudaSuccess;
}

// --- cuBLAS: a product is one kernel in its handle's stream ---------------------------------------------------------
// Without cuBLAS's header: it says the types of twenty arguments that nobody reads here.

struct Handle {
    cudaStream_t stream = nullptr;
};

EXPORT int cublasCreate_v2(void** handle) {
    if (forbidden("cublasCreate")) return 1;  // it allocates memory
    *handle = new Handle;
    return 0;
}

EXPORT int cublasDestroy_v2(void* handle) {
    delete (Handle*)handle;
    return 0;
}

EXPORT int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    ((Handle*)handle)->stream = stream;
    return 0;
}

EXPORT int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
EXPORT int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }

#define ACCEPTED(name) \
    EXPORT int name(...) { return 0; }
#define PRODUCT(name) \
    EXPORT int name(void* handle, ...) { return (int)launch(((Handle*)handle)->stream); }

ACCEPTED(cublasSetWorkspace_v2)
ACCEPTED(cublasSetMathMode)
ACCEPTED(cublasSetPointerMode_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)

EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                          void*, void*, void*, const void*, void*, size_t, cudaStream_t stream) {
    return (int)launch(stream);
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
    *found = 1;
    return 0;
}

// What describes a product to cublasLt: torch makes it and gives it back.
#define DESCRIPTION(name)                                       \
    EXPORT int name##Create(void** description, ...) {          \
        *description = calloc(1, 64);                           \
        return 0;                                               \
    }                                                           \
    EXPORT int name##Destroy(void* description) {               \
        free(description);                                      \
        return 0;                                               \
    }                                                           \
    ACCEPTED(name##SetAttribute)

DESCRIPTION(cublasLtMatmulDesc)
DESCRIPTION(cublasLtMatmulPreference)
DESCRIPTION(cublasLtMatrixLayout)
