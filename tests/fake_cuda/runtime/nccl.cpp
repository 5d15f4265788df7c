// NCCL between the processes of one machine, over shared memory: sums and copies are real.
//
// A collective is done by the thread that launches it, and so waits there for the other ranks, where a card would wait.

// NCCL's header includes those of half precision without using them, and they need headers that torch does not bring.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "shared.h"

static const size_t SLOT = 8 << 20;  // bytes of a rank in the shared memory: more are exchanged one after another
static const int MOST_RANKS = 64;

struct Shared {
    std::atomic<int> arrived, round;
    char card[MOST_RANKS][16];  // of each rank
};

struct ncclComm {
    int rank, size;
    Shared* shared;
    char* slots;
    std::atomic<bool> aborted{false};
    std::atomic<int> in_graphs{0};  // collectives that are part of a graph that lives
};

static const char* last_words = "";

static bool wait_for_all(ncclComm& comm) {
    int round = comm.shared->round;
    if (comm.shared->arrived.fetch_add(1) + 1 == comm.size) {
        comm.shared->arrived = 0;
        comm.shared->round++;
    } else {
        while (comm.shared->round == round && !comm.aborted) usleep(100);
    }
    return !comm.aborted;
}

// --- Communicators --------------------------------------------------------------------------------------------------

EXPORT ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static std::atomic<int> made{0};
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/fake-nccl-%d-%d", getpid(), made++);
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* handle, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
    if (fails("nccl-init")) {
        last_words = "Error while creating shared memory segment /dev/shm/nccl-stand-in (size 9637888), "
                     "error: No space left on device (28)";
        return ncclSystemError;
    }
    if (size > MOST_RANKS) return ncclInvalidArgument;
    size_t length = sizeof(Shared) + SLOT * size;
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, length) < 0) return ncclSystemError;
    char* memory = (char*)mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return ncclSystemError;
    auto* comm = new ncclComm;
    comm->rank = rank;
    comm->size = size;
    comm->shared = (Shared*)memory;
    comm->slots = memory + sizeof(Shared);
    strcpy(comm->shared->card[rank], bus_address(current_device()));
    wait_for_all(*comm);
    if (rank == 0) shm_unlink(id.internal);
    for (int other = 0; other < size; other++)
        if (other != rank && !strcmp(comm->shared->card[other], comm->shared->card[rank])) {
            static char words[128];
            snprintf(words, sizeof words, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %s", rank,
                     other, comm->shared->card[rank]);
            last_words = words;
            return ncclInvalidUsage;
        }
    *handle = comm;
    count("NCCL communicator");
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* handle, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(handle, size, id, rank, nullptr);
}

EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t* handle, int size, int rank, int, ncclUniqueId* id,
                                             ncclConfig_t* config) {
    return ncclCommInitRankConfig(handle, size, *id, rank, config);
}

EXPORT ncclResult_t ncclCommCount(const ncclComm_t comm, int* size) {
    *size = comm->size;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

EXPORT const char* ncclGetErrorString(ncclResult_t error) {
    switch (error) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
        case ncclSystemError: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case ncclInvalidUsage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        default: return "an error of the stand-in for NCCL";
    }
}

EXPORT const char* ncclGetLastError(ncclComm_t) { return last_words; }

// NCCL's guide, "Using NCCL with CUDA Graphs": a communicator's end waits for every graph that holds a call of it.
static ncclResult_t end(ncclComm_t comm, const char* call) {
    if (comm->in_graphs) {
        fprintf(stderr, "stand-in for NCCL: %s would wait for ever: graphs that live hold %d of its calls\n", call,
                comm->in_graphs.load());
        count("NCCL end that would hang");
    }
    count(call);
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t comm) { return end(comm, "ncclCommFinalize"); }
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) { return end(comm, "ncclCommDestroy"); }

EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
    comm->aborted = true;
    count("ncclCommAbort");
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
    *handle = (void*)16;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
EXPORT ncclResult_t ncclGroupStart() { return ncclSuccess; }
EXPORT ncclResult_t ncclGroupEnd() { return ncclSuccess; }

EXPORT ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* operation, void*, ncclDataType_t, ncclScalarResidence_t,
                                             ncclComm_t) {
    *operation = ncclSum;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

// --- Collectives ----------------------------------------------------------------------------------------------------

// Does a collective, or records it in the capture of its stream.
static ncclResult_t exchange(ncclComm_t comm, cudaStream_t stream, std::function<void()> work) {
    std::unique_lock<std::recursive_mutex> lock(everything);
    if (auto capture = stream_of(stream).capture) {
        if (fails("nccl-capture")) {
            invalidate(*capture, "what FAKE_CUDA_FAIL says", cudaErrorStreamCaptureUnsupported);
            return ncclUnhandledCudaError;
        }
        if (fails("nccl-capture-hangs")) {
            lock.unlock();
            for (;;) sleep(1);
        }
        comm->in_graphs++;
        std::shared_ptr<void> held(comm, [](void* one) { ((ncclComm_t)one)->in_graphs--; });
        count("NCCL in a capture");
        return perform(stream, "NCCL", [held, work] { work(); }) ? ncclUnhandledCudaError : ncclSuccess;
    }
    lock.unlock();
    return perform(stream, "NCCL", work) ? ncclUnhandledCudaError : ncclSuccess;
}

static size_t width(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
        default: return 8;
    }
}

static void broadcast(ncclComm& comm, const void* from, void* to, size_t bytes, int root) {
    for (size_t start = 0; start < bytes; start += SLOT) {
        size_t part = std::min(SLOT, bytes - start);
        if (comm.rank == root) memcpy(comm.slots, (const char*)from + start, part);
        if (!wait_for_all(comm)) return;
        memcpy((char*)to + start, comm.slots, part);
        if (!wait_for_all(comm)) return;
    }
}

template <class Number>
static void add_up(ncclComm& comm, const void* from, void* to, size_t number) {
    const size_t most = SLOT / sizeof(Number);
    for (size_t start = 0; start < number; start += most) {
        size_t part = std::min(most, number - start);
        memcpy(comm.slots + SLOT * comm.rank, (const Number*)from + start, part * sizeof(Number));
        if (!wait_for_all(comm)) return;
        std::vector<Number> sums(part);
        for (int rank = 0; rank < comm.size; rank++)
            for (size_t i = 0; i < part; i++) sums[i] += ((const Number*)(comm.slots + SLOT * rank))[i];
        if (!wait_for_all(comm)) return;
        memcpy((Number*)to + start, sums.data(), part * sizeof(Number));
    }
}

EXPORT ncclResult_t ncclAllReduce(const void* from, void* to, size_t number, ncclDataType_t type, ncclRedOp_t,
                                  ncclComm_t comm, cudaStream_t stream) {
    return exchange(comm, stream, [=] {
        switch (type) {
            case ncclFloat32: return add_up<float>(*comm, from, to, number);
            case ncclFloat64: return add_up<double>(*comm, from, to, number);
            case ncclInt32: return add_up<int>(*comm, from, to, number);
            case ncclInt64: return add_up<int64_t>(*comm, from, to, number);
            default: wait_for_all(*comm);  // half precision: what kernels made of it is no number anyway
        }
    });
}

EXPORT ncclResult_t ncclReduce(const void* from, void* to, size_t number, ncclDataType_t type, ncclRedOp_t operation,
                               int, ncclComm_t comm, cudaStream_t stream) {
    return ncclAllReduce(from, to ? to : (void*)from, number, type, operation, comm, stream);
}

EXPORT ncclResult_t ncclBroadcast(const void* from, void* to, size_t number, ncclDataType_t type, int root,
                                  ncclComm_t comm, cudaStream_t stream) {
    return exchange(comm, stream, [=] { broadcast(*comm, from, to, number * width(type), root); });
}

EXPORT ncclResult_t ncclBcast(void* data, size_t number, ncclDataType_t type, int root, ncclComm_t comm,
                              cudaStream_t stream) {
    return ncclBroadcast(data, data, number, type, root, comm, stream);
}

EXPORT ncclResult_t ncclAllGather(const void* from, void* to, size_t number, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    size_t bytes = number * width(type);
    return exchange(comm, stream, [=] {
        for (int root = 0; root < comm->size; root++) broadcast(*comm, from, (char*)to + root * bytes, bytes, root);
    });
}
