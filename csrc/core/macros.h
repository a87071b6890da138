// Part of csrc/core: algorithms without torch, compiled for the host and for the device from one source.
#pragma once

#ifdef __CUDACC__
#define PERSONVIT_HD __host__ __device__
#else
#define PERSONVIT_HD
#endif
