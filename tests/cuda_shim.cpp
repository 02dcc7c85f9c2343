// kernels/cuda for a CPU: `shim_launch` takes what cuLaunchKernel takes, and the kernel's name. And the functions of
// CUDA's libraries that cpm_kernels calls on the way to a launch, as a machine with one GPU would answer them.

#include "cuda_shim.h"

#include "glmquant.cu"

#include <cstdlib>
#include <utility>

namespace {

template <typename... Parameters, size_t... index>
void call(void (*kernel)(Parameters...), void** parameters, std::index_sequence<index...>) {
    kernel(*static_cast<Parameters*>(parameters[index])...);
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void** parameters) {
    blockDim = {threads, 1, 1};
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            call(kernel, parameters, std::index_sequence_for<Parameters...>{});
}

}  // namespace

extern "C" int shim_launch(const char* name, unsigned blocks, unsigned threads, void** parameters) {
#define KERNEL(kernel) \
    if (!std::strcmp(name, #kernel)) return launch(kernel, blocks, threads, parameters), 0;
    KERNEL(glmquant_scales)
    KERNEL(glmquant_encode)
    KERNEL(glmquant_pack)
    KERNEL(glmquant_unpack)
    KERNEL(glmquant_dequantize)
    KERNEL(glmquant_errors)
    return 1;
}

// ---- libcudart, libcublasLt, libnvrtc and libcuda in one. A function that the variable SHIM_FAILS names fails.

namespace {

int status(const char* name) {
    const char* failing = std::getenv("SHIM_FAILS");
    return failing && !std::strcmp(failing, name) ? 209 : 0;
}

template <typename Value>
int answer(const char* name, Value* to, Value value) {
    *to = value;
    return status(name);
}

}  // namespace

extern "C" {

int cudaRuntimeGetVersion(int* version) { return answer("cudaRuntimeGetVersion", version, 13000); }
int cudaGetDeviceCount(int* count) { return answer("cudaGetDeviceCount", count, 1); }
int cudaGetDevice(int* device) { return answer("cudaGetDevice", device, 0); }
int cudaSetDevice(int) { return status("cudaSetDevice"); }
int cudaDeviceGetAttribute(int* value, int, int) { return answer("cudaDeviceGetAttribute", value, 0); }
int cudaFree(void*) { return status("cudaFree"); }
const char* cudaGetErrorString(int) { return "out of luck"; }

size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void** handle) { return answer("cublasLtCreate", handle, static_cast<void*>(nullptr)); }

int nvrtcVersion(int* major, int* minor) { return *minor = 0, answer("nvrtcVersion", major, 13); }

int cuDriverGetVersion(int* version) { return answer("cuDriverGetVersion", version, 13000); }
int cuGetErrorString(int, const char** text) { return answer("cuGetErrorString", text, "out of luck"); }
int cuModuleLoadData(void** module, const void* code) {
    return answer("cuModuleLoadData", module, const_cast<void*>(code));
}
int cuModuleGetFunction(const void** function, void*, const char* name) {
    return answer("cuModuleGetFunction", function, static_cast<const void*>(strdup(name)));
}
int cuLaunchKernel(const void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned, void*, void** parameters, void**) {
    return shim_launch(static_cast<const char*>(function), blocks, threads, parameters);
}
}
