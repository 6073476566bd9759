"""The CUDA kernel of section 21, compiled as C++ and run on the CPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

# The threads of a block take turns on one thread of the CPU, each as far as the next
# barrier, which takes a hundredth of what as many real threads took. So a barrier that
# is missing shows each time, as the first thread then reads what the last has not
# written yet.
CUDA_AS_CPP = r"""
#include <ucontext.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#define __shared__ static
using std::min;
using Shape = std::array<int, 3>;
struct dim3 { int x; };
struct uint4 { unsigned x, y, z, w; };
static dim3 threadIdx, blockIdx;
static const int most_threads = 1024;
static ucontext_t scheduler, contexts[most_threads];
static char stacks[most_threads][1 << 16];
static float exchanged[2][most_threads];  // in turn: who is slow still reads the other
static int turns[most_threads];
static void __syncthreads() { swapcontext(&contexts[threadIdx.x], &scheduler); }
static float __shfl_xor_sync(unsigned, float v, int n) {  // every warp takes part
  float* all = exchanged[turns[threadIdx.x] ^= 1];
  all[threadIdx.x] = v;
  __syncthreads();
  return all[threadIdx.x ^ n];
}
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __byte_perm(uint64_t low, uint64_t high, unsigned selector) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= ((high << 32 | low) >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
static const uint4* weight_end;
static int faults;  // reads past the end, and barriers that not all threads reach
static uint4 __ldcs(const uint4* p) {
  if (p < weight_end) return *p;
  ++faults;
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
static void** p;
static Shape* s;
static int ended;
static void run_thread() {
  kernel(%(arguments)s);
  ++ended;
}
extern "C" int launch(int blocks, int threads, void** pointers, Shape* shapes) {
  p = pointers;
  s = shapes;
  faults = 0;
  weight_end = (uint4*)p[1] + s[1][0] * s[1][1] * s[1][2] / 4;
  for (blockIdx.x = blocks; blockIdx.x-- > 0;) {
    for (int t = 0; t < threads; ++t) {
      getcontext(&contexts[t]);
      contexts[t].uc_stack.ss_sp = stacks[t];
      contexts[t].uc_stack.ss_size = sizeof stacks[t];
      contexts[t].uc_link = &scheduler;
      makecontext(&contexts[t], run_thread, 0);
      turns[t] = 0;
    }
    for (ended = 0; ended == 0;)
      for (int t = 0; t < threads; ++t) {
        threadIdx.x = t;
        swapcontext(&scheduler, &contexts[t]);
      }
    faults += ended != threads;
  }
  return faults;
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
        options = "-std=c++20 -O1 -fno-strict-aliasing -w -shared -fPIC"
        command = [compiler, *options.split(), str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def emulated_kernel(name, input_names, output_names, source):
    """mx.fast.cuda_kernel by a C++ compiler, for an output in bfloat16."""
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
        assert launch(blocks, threads, pointers, shapes_at) == 0
        return [mx.array(data[-1]).view(mx.bfloat16)]

    return run
