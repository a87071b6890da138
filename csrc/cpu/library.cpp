// Schemas of the operators. CPU and CUDA implementations register themselves in their own files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(personvit, library) {
  library.def(
      "block_masks(Tensor targets, int height, int width, int seed, int first, float log_aspect_low, "
      "float log_aspect_high) -> Tensor");
  library.def("knn(Tensor query, Tensor gallery, int k) -> (Tensor, Tensor)");
}
