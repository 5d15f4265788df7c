#include "shared.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>

std::recursive_mutex everything;

std::string setting(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}

bool fails(const char* what) {
    return setting("FAKE_CUDA_FAIL") == what && (setting("FAKE_CUDA_FAIL_RANK").empty() || setting("FAKE_CUDA_FAIL_RANK") == setting("RANK"));
}

// Like all that is kept here it is never destroyed: torch calls on while the process ends.
static std::map<std::string, long>& counters() {
    static auto& all = *new std::map<std::string, long>;
    return all;
}

void count(const std::string& what, long times) {
    LOCKED;
    counters()[what] += times;
}

static std::string report() {
    LOCKED;
    std::string lines;
    for (auto& [what, times] : counters()) lines += what + ": " + std::to_string(times) + "\n";
    return lines;
}

// Returns lines of "what: how often".
EXPORT const char* fake_cuda_counts() {
    static auto& lines = *new std::string;
    return (lines = report()).c_str();
}

EXPORT void fake_cuda_reset_counts() {
    LOCKED;
    counters().clear();
}

// A process that ends by itself leaves its counts in the folder FAKE_CUDA_REPORTS.
__attribute__((destructor)) static void leave_report() {
    std::string folder = setting("FAKE_CUDA_REPORTS");
    if (folder.empty() || counters().empty()) return;
    std::string name = folder + "/rank" + setting("RANK", "0") + "." + std::to_string(getpid()) + ".txt";
    if (FILE* file = fopen(name.c_str(), "w")) {
        fputs(report().c_str(), file);
        fclose(file);
    }
}
