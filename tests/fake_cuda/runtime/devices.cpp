// Cards and memory: the memory of a card is the host's, and copies are real.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "shared.h"

// --- Cards ----------------------------------------------------------------------------------------------------------

struct Card {
    const char* name;
    int major, minor;  // compute capability
    size_t memory;
    int multiprocessors;
};

static const Card& card() {
    static const Card turing{"NVIDIA GeForce RTX 2080 Ti (stand-in)", 7, 5, 11ull << 30, 68};
    static const Card hopper{"NVIDIA H200 (stand-in)", 9, 0, 141ull << 30, 132};
    return setting("FAKE_CUDA_CARD", "turing") == "hopper" ? hopper : turing;
}

// Which of the machine's cards this process sees: all of FAKE_CUDA_DEVICES, or those that CUDA_VISIBLE_DEVICES names.
static const std::vector<int>& visible() {
    static const auto& cards = *new std::vector<int>([] {
        std::vector<int> found;
        int present = atoi(setting("FAKE_CUDA_DEVICES", "1").c_str());
        if (!getenv("CUDA_VISIBLE_DEVICES")) {
            for (int index = 0; index < present; index++) found.push_back(index);
            return found;
        }
        std::string named = setting("CUDA_VISIBLE_DEVICES") + ",";
        for (size_t start = 0, end; (end = named.find(',', start)) != std::string::npos; start = end + 1) {
            std::string number = named.substr(start, end - start);
            // As the guide says: cards behind one that does not exist are not visible.
            if (number.empty() || !isdigit(number[0]) || atoi(number.c_str()) >= present) break;
            found.push_back(atoi(number.c_str()));
        }
        return found;
    }());
    return cards;
}

static thread_local int device = 0;
static thread_local cudaError_t last_error = cudaSuccess;

int current_device() { return device; }

const char* bus_address(int index) {
    static thread_local char text[16];
    snprintf(text, sizeof text, "0000:%02x:00.0", visible()[index] + 1);
    return text;
}

cudaError_t noted(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

static bool exists(int index) { return index >= 0 && index < (int)visible().size(); }

EXPORT cudaError_t cudaGetDeviceCount(int* number) {
    *number = (int)visible().size();
    return noted(*number ? cudaSuccess : cudaErrorNoDevice);
}

EXPORT cudaError_t cudaGetDevice(int* index) {
    *index = device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int index) {
    if (!exists(index)) return noted(cudaErrorInvalidDevice);
    device = index;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
    memset(properties, 0, sizeof *properties);
    if (!exists(index)) return noted(cudaErrorInvalidDevice);
    strcpy(properties->name, card().name);
    properties->major = card().major;
    properties->minor = card().minor;
    properties->totalGlobalMem = card().memory;
    properties->multiProcessorCount = card().multiprocessors;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = properties->maxThreadsPerMultiProcessor = 1024;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerMultiprocessor = properties->sharedMemPerBlockOptin = 65536;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->l2CacheSize = 5767168;
    properties->textureAlignment = 512;
    properties->pciBusID = visible()[index] + 1;
    properties->uuid.bytes[0] = (char)(visible()[index] + 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
    cudaDeviceProp properties;
    if (cudaError_t error = cudaGetDeviceProperties(&properties, index)) return error;
    static const auto& numbers = *new std::map<int, int cudaDeviceProp::*>{
        {cudaDevAttrComputeCapabilityMajor, &cudaDeviceProp::major},
        {cudaDevAttrComputeCapabilityMinor, &cudaDeviceProp::minor},
        {cudaDevAttrMultiProcessorCount, &cudaDeviceProp::multiProcessorCount},
        {cudaDevAttrMaxThreadsPerBlock, &cudaDeviceProp::maxThreadsPerBlock},
        {cudaDevAttrMaxThreadsPerMultiProcessor, &cudaDeviceProp::maxThreadsPerMultiProcessor},
        {cudaDevAttrMaxRegistersPerBlock, &cudaDeviceProp::regsPerBlock},
        {cudaDevAttrMaxRegistersPerMultiprocessor, &cudaDeviceProp::regsPerMultiprocessor},
        {cudaDevAttrWarpSize, &cudaDeviceProp::warpSize},
    };
    static const auto& sizes = *new std::map<int, size_t cudaDeviceProp::*>{
        {cudaDevAttrMaxSharedMemoryPerBlock, &cudaDeviceProp::sharedMemPerBlock},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &cudaDeviceProp::sharedMemPerMultiprocessor},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &cudaDeviceProp::sharedMemPerBlockOptin},
    };
    *value = 0;
    if (auto found = numbers.find(attribute); found != numbers.end()) *value = properties.*found->second;
    if (auto found = sizes.find(attribute); found != sizes.end()) *value = (int)(properties.*found->second);
    if (attribute >= cudaDevAttrMaxGridDimX && attribute <= cudaDevAttrMaxGridDimZ)
        *value = properties.maxGridSize[attribute - cudaDevAttrMaxGridDimX];
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int index) {
    if (!exists(index)) return noted(cudaErrorInvalidDevice);
    snprintf(text, length, "%s", bus_address(index));
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

EXPORT const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        default: return "an error of the stand-in for CUDA";
    }
}

EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// --- Memory ---------------------------------------------------------------------------------------------------------

using Blocks = std::map<const char*, size_t>;  // where they begin, and their sizes
static Blocks &on_device = *new Blocks, &pinned = *new Blocks;
static size_t taken = 0;  // of the device's memory

static bool within(const Blocks& blocks, const void* address) {
    LOCKED;
    auto next = blocks.upper_bound((const char*)address);
    if (next == blocks.begin()) return false;
    auto& [start, size] = *std::prev(next);
    return (const char*)address < start + size;
}

bool is_device_memory(const void* address) { return within(on_device, address); }
bool is_pinned_memory(const void* address) { return within(pinned, address); }

// What the card can hold for this process: a share of it is taken by CUDA itself.
static size_t capacity() {
    std::string bytes = setting("FAKE_CUDA_FREE_BYTES");
    return bytes.empty() ? card().memory - (300ull << 20) : strtoull(bytes.c_str(), nullptr, 10);
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    LOCKED;
    *total = card().memory;
    *free = capacity() - taken;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMalloc(void** address, size_t size) {
    LOCKED;
    if (forbidden("cudaMalloc")) return noted(cudaErrorStreamCaptureUnsupported);
    size = (size + 4095) & ~(size_t)4095;
    if (taken + size > capacity()) return noted(cudaErrorMemoryAllocation);
    *address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    on_device[(const char*)*address] = size;
    taken += size;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void* address) {
    LOCKED;
    if (!address) return cudaSuccess;
    if (forbidden("cudaFree")) return noted(cudaErrorStreamCaptureUnsupported);
    auto found = on_device.find((const char*)address);
    if (found == on_device.end()) return noted(cudaErrorInvalidValue);
    munmap(address, found->second);
    taken -= found->second;
    on_device.erase(found);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
    LOCKED;
    if (forbidden("cudaHostAlloc")) return noted(cudaErrorStreamCaptureUnsupported);
    *address = calloc(1, size + 64);
    pinned[(const char*)*address] = size;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* address) {
    LOCKED;
    if (forbidden("cudaFreeHost")) return noted(cudaErrorStreamCaptureUnsupported);
    pinned.erase((const char*)address);
    free(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    memset(attributes, 0, sizeof *attributes);
    bool here = is_device_memory(address);
    attributes->type = here                        ? cudaMemoryTypeDevice
                       : is_pinned_memory(address) ? cudaMemoryTypeHost
                                                   : cudaMemoryTypeUnregistered;
    attributes->device = here ? device : cudaInvalidDeviceId;
    attributes->devicePointer = here ? (void*)address : nullptr;
    return cudaSuccess;
}

static const char* direction(const void* to, const void* from) {
    if (is_device_memory(to)) return is_device_memory(from) ? "copy on the device" : "copy host to device";
    return is_device_memory(from) ? "copy device to host" : "copy on the host";
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    wait_for_device();
    LOCKED;
    if (forbidden("cudaMemcpy")) return noted(cudaErrorStreamCaptureUnsupported);
    count(direction(to, from));
    memcpy(to, from, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
    auto pageable = [](const void* address) { return !is_device_memory(address) && !is_pinned_memory(address); };
    const char* what = direction(to, from);
    {
        LOCKED;
        Stream& stream = stream_of(handle);
        // The driver copies from and to pageable memory by itself, and waits: no kernel of a graph can do that.
        if (stream.capture && (pageable(to) || pageable(from)))
            return noted(invalidate(*stream.capture, "cudaMemcpyAsync of pageable memory",
                                    cudaErrorStreamCaptureUnsupported));
        if (stream.capture && is_device_memory(to) && is_pinned_memory(from)) {
            // A graph reads the host's memory anew at each launch: it must still be what was recorded.
            auto recorded = std::make_shared<std::string>((const char*)from, size);
            return perform(handle, what, [=] {
                if (memcmp(from, recorded->data(), size)) count("graph copied host memory that had changed");
                memcpy(to, from, size);
            });
        }
    }
    if (pageable(to)) wait_for_device();  // "returns only once the copy has completed" (API synchronization behavior)
    return perform(handle, what, [=] { memcpy(to, from, size); });
}

EXPORT cudaError_t cudaMemset(void* to, int value, size_t size) {
    memset(to, value, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
    return perform(stream, "memset", [=] { memset(to, value, size); });
}
