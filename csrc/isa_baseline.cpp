// The kernels for any machine of the architecture.

#include <algorithm>
#include <bit>
#include <cstdint>

#include "resample.h"

#define REVBIFPN_ISA baseline
#include "kernels/kernels.h"
