#include "sample_loss/loss_rows_cpu.h"

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("sample_loss", TORCH_BOX(&als::sample_loss<als::CpuLosses>));
  m.impl("sample_loss_backward", TORCH_BOX(&als::sample_loss_backward<als::CpuLosses>));
}
