// Streams, events, and stream capture with CUDA's rules.
//
// The rules are those of the CUDA C++ Programming Guide, "CUDA Graphs / Creating a Graph Using Stream Capture", and of
// the reference of cudaStreamBeginCapture and cudaThreadExchangeStreamCaptureMode.
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "shared.h"

struct Event {
    bool recorded = false;
    double milliseconds = 0;
    bool in_capture = false;         // last recorded in a stream that was being captured
    std::weak_ptr<Capture> capture;  // which may have ended since
    std::set<int> last;              // the nodes of the capture that it stands behind
};

static auto& ongoing = *new std::set<std::shared_ptr<Capture>>;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static std::atomic<bool> never_ends{false};  // a graph that never ends was launched

static Event& event_of(cudaEvent_t handle) { return *(Event*)handle; }

// A stream of its own for the handles 0 (default), 1 (legacy) and 2 (per thread).
static bool is_default(cudaStream_t handle) { return (uintptr_t)handle <= 2; }

Stream& stream_of(cudaStream_t handle) {
    static auto* defaults = new Stream[3];
    return is_default(handle) ? defaults[(uintptr_t)handle] : *(Stream*)handle;
}

void wait_for_device() {
    while (never_ends) sleep(1);
}

// --- What capture forbids -------------------------------------------------------------------------------------------

cudaError_t invalidate(Capture& capture, const char* call, cudaError_t error) {
    capture.invalid = true;
    count(std::string("forbidden in capture: ") + call);
    return error;
}

// A call that may end up waiting for a stream is "potentially unsafe". The thread that captures may not make it, unless
// its capture is relaxed; nor may any other thread while a capture is global. A thread can free itself of both.
bool forbidden(const char* call) {
    LOCKED;
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    for (auto& capture : ongoing) {
        bool ours = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        bool others = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
        if (ours || others) {
            invalidate(*capture, call, cudaErrorStreamCaptureUnsupported);
            return true;
        }
    }
    return false;
}

static bool this_thread_captures() {
    for (auto& capture : ongoing)
        if (capture->thread == std::this_thread::get_id()) return true;
    return false;
}

cudaError_t perform(cudaStream_t handle, const char* what, std::function<void()> work) {
    {
        LOCKED;
        Stream& stream = stream_of(handle);
        if (stream.capture) {
            Capture& capture = *stream.capture;
            if (capture.invalid) return noted(cudaErrorStreamCaptureInvalidated);
            capture.graph->nodes.push_back({stream.last, work});
            stream.last = {(int)capture.graph->nodes.size() - 1};
            count("captured");
            return cudaSuccess;
        }
        // CUDA allows it. But a step that launches work beside its capture is not whole in the graph.
        if (this_thread_captures()) count(std::string("beside a capture: ") + what);
        count(what);
    }
    work();
    return cudaSuccess;
}

// --- Streams --------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int priority) {
    auto* stream = new Stream;
    stream->priority = priority;
    *handle = (cudaStream_t)stream;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // torch keeps its streams

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    *priority = stream_of(handle).priority;
    return cudaSuccess;
}

// A stream that is being captured has no work that one could ask for, or wait for.
static cudaError_t ask(cudaStream_t handle, const char* call) {
    LOCKED;
    if (auto capture = stream_of(handle).capture) return invalidate(*capture, call, cudaErrorStreamCaptureUnsupported);
    return forbidden(call) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
    if (cudaError_t error = ask(handle, "cudaStreamQuery")) return noted(error);
    return never_ends ? cudaErrorNotReady : cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    if (cudaError_t error = ask(handle, "cudaStreamSynchronize")) return noted(error);
    count("stream synchronize");
    wait_for_device();
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize() {
    if (forbidden("cudaDeviceSynchronize")) return noted(cudaErrorStreamCaptureUnsupported);
    count("device synchronize");
    wait_for_device();
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
    return perform(stream, "host function", [=] { function(argument); });
}

// --- Events ---------------------------------------------------------------------------------------------------------

static std::shared_ptr<Capture> ongoing_capture(const Event& event) {
    auto capture = event.capture.lock();
    return capture && ongoing.count(capture) ? capture : nullptr;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
    *handle = (cudaEvent_t) new Event;
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    LOCKED;
    delete &event_of(handle);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t in) {
    LOCKED;
    Stream& stream = stream_of(in);
    if (stream.capture && stream.capture->invalid) return noted(cudaErrorStreamCaptureInvalidated);
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    Event& event = event_of(handle);
    event.recorded = true;
    event.milliseconds = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    event.in_capture = stream.capture != nullptr;
    event.capture = stream.capture;
    event.last = stream.last;
    if (!stream.capture) count("event recorded");
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

// An event recorded in a capture stands for a place in a graph, not for a moment: nobody can ask for it, or wait for it.
static cudaError_t ask(const Event& event, const char* call) {
    LOCKED;
    if (event.in_capture) {
        if (auto capture = ongoing_capture(event)) invalidate(*capture, call, cudaErrorCapturedEvent);
        count(std::string("forbidden on a captured event: ") + call);
        return cudaErrorCapturedEvent;
    }
    return forbidden(call) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
    if (cudaError_t error = ask(event_of(handle), "cudaEventQuery")) return noted(error);
    return never_ends ? cudaErrorNotReady : cudaSuccess;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    if (cudaError_t error = ask(event_of(handle), "cudaEventSynchronize")) return noted(error);
    count("event synchronize");
    wait_for_device();
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    if (event_of(start).in_capture || event_of(end).in_capture) return noted(cudaErrorCapturedEvent);
    *milliseconds = (float)(event_of(end).milliseconds - event_of(start).milliseconds);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t for_event, unsigned flags) {
    LOCKED;
    Stream& stream = stream_of(handle);
    Event& event = event_of(for_event);
    if (flags == cudaEventWaitExternal || !event.recorded) return cudaSuccess;
    auto theirs = ongoing_capture(event);
    if (stream.capture) {
        if (stream.capture->invalid) return noted(cudaErrorStreamCaptureInvalidated);
        if (!theirs)
            return noted(invalidate(*stream.capture, "cudaStreamWaitEvent for work that is not captured",
                                    cudaErrorStreamCaptureIsolation));
        if (theirs != stream.capture)
            return noted(invalidate(*theirs, "cudaStreamWaitEvent for another capture", cudaErrorStreamCaptureMerge));
        stream.last.insert(event.last.begin(), event.last.end());
    } else if (theirs) {  // the stream joins the capture
        if (is_default(handle))
            return noted(invalidate(*theirs, "cudaStreamWaitEvent in a default stream", cudaErrorStreamCaptureImplicit));
        stream.capture = theirs;
        stream.last = event.last;
        theirs->streams.insert(&stream);
    } else if (event.in_capture) {
        return noted(cudaErrorCapturedEvent);
    }
    return cudaSuccess;
}

// --- Capture --------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(thread_mode, *mode);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    LOCKED;
    static unsigned long long captures = 0;
    if (is_default(handle)) return noted(cudaErrorStreamCaptureUnsupported);
    Stream& stream = stream_of(handle);
    if (stream.capture) return noted(cudaErrorIllegalState);
    stream.capture = std::make_shared<Capture>();
    stream.capture->id = ++captures;
    stream.capture->mode = mode;
    stream.capture->thread = std::this_thread::get_id();
    stream.capture->origin = &stream;
    stream.capture->streams.insert(&stream);
    stream.last.clear();
    ongoing.insert(stream.capture);
    count("capture begun");
    return cudaSuccess;
}

// Returns a node and all nodes that it comes after, directly or not.
static std::set<int> up_to(const Graph& graph, const std::set<int>& last) {
    std::set<int> found;
    std::vector<int> left(last.begin(), last.end());
    while (!left.empty()) {
        int node = left.back();
        left.pop_back();
        if (found.insert(node).second)
            left.insert(left.end(), graph.nodes[node].after.begin(), graph.nodes[node].after.end());
    }
    return found;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    LOCKED;
    Stream& stream = stream_of(handle);
    auto capture = stream.capture;
    *graph = nullptr;
    if (!capture || capture->origin != &stream) return noted(cudaErrorIllegalState);
    // Every stream that joined must have been joined again: the origin waits for its last work.
    auto joined = up_to(*capture->graph, stream.last);
    cudaError_t error = capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    for (Stream* one : capture->streams)
        for (int node : one->last)
            if (!error && !joined.count(node)) error = cudaErrorStreamCaptureUnjoined;
    if (!error && capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
        error = cudaErrorStreamCaptureWrongThread;
    for (Stream* one : capture->streams) {
        one->capture = nullptr;
        one->last.clear();
    }
    ongoing.erase(capture);
    count(error ? "capture failed" : "capture ended");
    if (!error) *graph = (cudaGraph_t) new GraphHandle(capture->graph);
    return noted(error);
}

static cudaStreamCaptureStatus status_of(const Stream& stream) {
    if (!stream.capture) return cudaStreamCaptureStatusNone;
    return stream.capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    LOCKED;
    *status = status_of(stream_of(handle));
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies,
#if CUDART_VERSION >= 13000
                                            const cudaGraphEdgeData** edges,
#endif
                                            size_t* number) {
#if CUDART_VERSION >= 13000
    if (edges) *edges = nullptr;
#endif
    LOCKED;
    Stream& stream = stream_of(handle);
    *status = status_of(stream);
    if (stream.capture && id) *id = stream.capture->id;
    if (stream.capture && graph) *graph = (cudaGraph_t)&stream.capture->graph;
    if (dependencies) *dependencies = nullptr;
    if (number) *number = 0;
    return cudaSuccess;
}

// --- Graphs ---------------------------------------------------------------------------------------------------------

static GraphHandle& graph_of(void* handle) { return *(GraphHandle*)handle; }

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
    *number = graph_of(graph)->nodes.size();
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    LOCKED;
    *executable = (cudaGraphExec_t) new GraphHandle(graph_of(graph));
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    LOCKED;
    delete &graph_of(graph);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    LOCKED;
    delete &graph_of(executable);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    GraphHandle graph = graph_of(executable);
    static std::atomic<int> launches{0};
    count("graph launch");
    if (std::to_string(++launches) == setting("FAKE_CUDA_STOP_AT")) kill(getpid(), SIGTERM);
    // A launch returns at once; it is the next one to wait for the device who finds that it never ends.
    if (fails("replay-hangs")) never_ends = true;
    if (!never_ends)
        for (Node& node : graph->nodes) node.work();  // the order of recording is one that the graph allows
    return cudaSuccess;
}

// An object that a graph may own: its destructor is called when the last reference goes.
struct UserObject {
    std::shared_ptr<void> object;
    unsigned held;  // references of the user's own
};

EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t* handle, void* object, cudaHostFn_t destroy, unsigned held,
                                        unsigned) {
    *handle = (cudaUserObject_t) new UserObject{{object, destroy}, held};
    return cudaSuccess;
}

EXPORT cudaError_t cudaUserObjectRelease(cudaUserObject_t handle, unsigned number) {
    LOCKED;
    auto* object = (UserObject*)handle;
    object->held -= number;
    if (!object->held) delete object;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t handle, unsigned number,
                                             unsigned flags) {
    LOCKED;
    graph_of(graph)->kept.push_back(((UserObject*)handle)->object);
    return flags & cudaGraphUserObjectMove ? cudaUserObjectRelease(handle, number) : cudaSuccess;
}
