// Rows of a sparse matrix: row r holds the entries indptr[r] to indptr[r + 1], columns ascending.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace personvit {

struct SparseRows {
  const int64_t* indptr;   // [rows + 1]
  const int64_t* indices;  // [nnz] columns
  const float* values;     // [nnz]
};

}  // namespace personvit
