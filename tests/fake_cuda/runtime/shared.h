// What the parts of the stand-in share: settings, counters, streams, and what a stream's capture records.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// What torch calls is visible, and so comes before the libraries of the same names that torch brings.
#define EXPORT extern "C" __attribute__((visibility("default")))

// One lock for everything: simple, and little happens at once.
extern std::recursive_mutex everything;
#define LOCKED std::lock_guard<std::recursive_mutex> locked(everything)

// Settings are environment variables; README.md lists them.
std::string setting(const char* name, const char* otherwise = "");
bool fails(const char* what);  // whether FAKE_CUDA_FAIL asks for this failure, on this rank

// Counters, by what is counted. Tests read them through ctypes or from a file.
void count(const std::string& what, long times = 1);

// Keeps an error for cudaGetLastError, and returns it.
cudaError_t noted(cudaError_t error);

int current_device();
const char* bus_address(int device);  // which tells cards apart between processes
bool is_device_memory(const void* address);
bool is_pinned_memory(const void* address);

// --- Graphs and captures: what a capture records is the work of a graph.

struct Node {
    std::set<int> after;  // the nodes that it comes after
    std::function<void()> work;
};

struct Graph {
    std::vector<Node> nodes;
    std::vector<std::shared_ptr<void>> kept;  // what lives as long as the graph (user objects)
};

// A cudaGraph_t and a cudaGraphExec_t are each a pointer to one of these: a graph lives until its last handle is
// destroyed, as the guide says of the resources of a graph that was instantiated.
using GraphHandle = std::shared_ptr<Graph>;

struct Stream;

struct Capture {
    unsigned long long id;
    cudaStreamCaptureMode mode;
    std::thread::id thread;  // that began it
    Stream* origin;
    GraphHandle graph = std::make_shared<Graph>();
    std::set<Stream*> streams;  // the origin, and those that joined by waiting for an event of it
    bool invalid = false;       // a call that is forbidden was made: the capture will end with an error
};

struct Stream {
    int priority = 0;
    std::shared_ptr<Capture> capture;  // none: work is done at once
    std::set<int> last;                // the nodes of the capture that its next work comes after
};

Stream& stream_of(cudaStream_t handle);

// Whether this thread may not make a call now because of a capture, which is then invalid.
bool forbidden(const char* call);

// Marks a capture invalid because of a call, which is counted.
cudaError_t invalidate(Capture& capture, const char* call, cudaError_t error);

// Does a stream's work at once; or records it, where the stream is being captured.
cudaError_t perform(cudaStream_t stream, const char* what, std::function<void()> work);

// Waits for the device, which takes no time here, unless a graph that never ends was launched.
void wait_for_device();
