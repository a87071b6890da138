// Part of csrc/core: algorithms without torch, compiled for the host and for the device from one source.
#pragma once

#if defined(__GNUC__) || defined(__CUDACC__)
#define PERSONVIT_RESTRICT __restrict__
#else
#define PERSONVIT_RESTRICT
#endif

#ifdef __CUDACC__
#define PERSONVIT_HD __host__ __device__
#else
#define PERSONVIT_HD
#endif
