// Schemas of the operators. CPU and CUDA implementations register themselves in their own files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(personvit, library) {
  library.def(
      "block_masks(Tensor targets, int height, int width, int seed, int first, float log_aspect_low, "
      "float log_aspect_high) -> Tensor");
  library.def(
      "photometry(Tensor views, Tensor maps, Tensor kernels, Tensor radius, Tensor solarize, Tensor mean, "
      "Tensor deviation, Tensor(a!) out) -> ()");
  library.def("knn(Tensor query, Tensor gallery, int k) -> (Tensor, Tensor, Tensor)");
  library.def("knn_begin(Tensor features, int k) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "knn_step(Tensor features, Tensor panels, Tensor(a!) distances, Tensor(b!) indices, Tensor(c!) largest, int "
      "step, "
      "int steps) -> int");
  library.def("pairwise_distance(Tensor query, Tensor gallery) -> Tensor");
  library.def("k_reciprocal(Tensor neighbours, int k1) -> (Tensor, Tensor)");
  library.def("reciprocal_weights(Tensor features, Tensor row_max, Tensor indptr, Tensor indices) -> Tensor");
  library.def(
      "query_expansion(Tensor indptr, Tensor indices, Tensor values, Tensor neighbours, int k2) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "jaccard(Tensor indptr, Tensor indices, Tensor values, Tensor offsets, Tensor rows, Tensor weights, "
      "int gallery_rows) -> Tensor");
  library.def(
      "inverted_index(Tensor indptr, Tensor indices, Tensor values, int num_query) -> (Tensor, Tensor, Tensor)");
  library.def(
      "rerank_matrix(Tensor query, Tensor gallery, Tensor row_max, Tensor indptr, Tensor indices, Tensor values, "
      "Tensor offsets, Tensor rows, Tensor weights, float lambda_value) -> Tensor");
  library.def(
      "rerank_lists(Tensor query, Tensor gallery, Tensor row_max, Tensor indptr, Tensor indices, Tensor values, "
      "Tensor offsets, Tensor rows, Tensor weights, float lambda_value, int top) -> (Tensor, Tensor)");
  library.def(
      "rank_counts(Tensor distances, Tensor q_pids, Tensor g_pids, Tensor q_camids, Tensor g_camids) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
