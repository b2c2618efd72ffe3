// Device code of knn. Torch-free.
//
//   1. mean of the database and how far it reaches (float64)             knn_rows.cuh
//   2. centred, scaled tiles in bf16, lengths of what rounding took      knn_pack.cuh
//   3. scores on tensor cores; only the largest of 16 rows is written    knn_score.cuh
//      the same on compute capability 9.0                                knn_score_hopper.cuh
//   4. per query: the groups that can hold one of the k best (error
//      bound of knn_math.h)                                              knn_groups.cuh
//      their rows in float32, with a bound again, what that leaves in
//      float64, the k smallest                                           knn_select.cuh
//   5. queries for which those are too many: float32 scores              knn_rescore.cuh
//   6. as 4, for them
//
// Few queries, or few rows: group maxima from the rows as they lie (knn_few.cuh), then 4.
//
// A database may come in parts: then all of it for each part, and 4 and 6 go on with the lists that
// the parts in front left.
//
// A group is left out only when the bound proves that k other rows come first, so the result is
// exact. Where no bound can help (all-zero query under cosine, fewer groups than k, overflow) every
// group is taken. All of it is decided on the device: the host launches the same kernels always.
#pragma once

#include "knn/knn_few.cuh"
#include "knn/knn_pack.cuh"
#include "knn/knn_rescore.cuh"
#include "knn/knn_rows.cuh"
#include "knn/knn_score.cuh"
#include "knn/knn_score_hopper.cuh"
#include "knn/knn_select.cuh"
