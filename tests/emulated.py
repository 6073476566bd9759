"""The CUDA kernel of section 17, compiled as C++ and run on the CPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

CUDA_AS_CPP = r"""
#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#define __shared__ static
using std::min;
using Shape = std::array<int, 3>;
struct dim3 { int x; };
struct uint4 { unsigned x, y, z, w; };
static thread_local dim3 threadIdx, blockIdx;
static float exchanged[1024];
static std::barrier<>* everyone;
static void __syncthreads() { everyone->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float v, int n) {  // every warp takes part
  exchanged[threadIdx.x] = v;
  __syncthreads();
  v = exchanged[threadIdx.x ^ n];
  __syncthreads();
  return v;
}
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __byte_perm(uint64_t low, uint64_t high, unsigned selector) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= ((high << 32 | low) >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
static const uint4* weight_end;
static std::atomic<int> outside;
static uint4 __ldcs(const uint4* p) {
  if (p < weight_end) return *p;
  ++outside;
  return {};
}
static float rsqrtf(float v) { return 1 / std::sqrt(v); }
struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return __uint_as_float(bits << 16); }
  void operator=(float f) {  // to the nearest, ties to even
    unsigned u;
    memcpy(&u, &f, 4);
    bits = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  }
};
static void kernel(%(parameters)s) {
%(source)s
}
extern "C" int launch(int blocks, int threads, void** p, Shape* s) {
  std::barrier barrier(threads);
  everyone = &barrier;
  outside = 0;
  weight_end = (uint4*)p[1] + s[1][0] * s[1][1] * s[1][2] / 4;
  {
    std::vector<std::jthread> all;
    for (int t = 0; t < threads; ++t)
      all.emplace_back([=] {
        threadIdx.x = t;
        for (blockIdx.x = blocks; blockIdx.x-- > 0; __syncthreads())
          kernel(%(arguments)s);
      });
  }
  return outside;
}
"""


@functools.cache
def compiled_library(code):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither CUDA nor a C++ compiler is here")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(code)
        options = "-std=c++20 -O1 -fno-strict-aliasing -w -shared -fPIC -pthread"
        command = [compiler, *options.split(), str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def emulated_kernel(name, input_names, output_names, source):
    """mx.fast.cuda_kernel by a C++ compiler and threads, for an output in bfloat16."""
    kinds = {mx.bfloat16: "__nv_bfloat16", mx.uint32: "uint32_t", mx.float32: "float"}
    names = [*input_names, *output_names]

    def run(*, inputs, grid, threadgroup, output_shapes, output_dtypes):
        arrays = [*inputs, mx.zeros(output_shapes[0], output_dtypes[0])]
        types = [f"{kinds[array.dtype]}*" for array in arrays]
        code = CUDA_AS_CPP % {
            "parameters": ", ".join(
                f"{kind} {name}, Shape {name}_shape" for kind, name in zip(types, names)
            ),
            "source": source,
            "arguments": ", ".join(f"({t})p[{i}], s[{i}]" for i, t in enumerate(types)),
        }
        views = (a.view(mx.uint16) if a.dtype == mx.bfloat16 else a for a in arrays)
        data = [np.array(view) for view in views]
        pointers = (ctypes.c_void_p * len(data))(*(part.ctypes.data for part in data))
        shapes = np.array([(*array.shape, 0, 0, 0)[:3] for array in arrays], np.int32)
        launch = compiled_library(code).launch
        blocks, threads = grid[0] // threadgroup[0], threadgroup[0]
        shapes_at = ctypes.c_void_p(shapes.ctypes.data)
        assert launch(blocks, threads, pointers, shapes_at) == 0  # reads past the end
        return [mx.array(data[-1]).view(mx.bfloat16)]

    return run
