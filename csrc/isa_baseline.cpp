// The kernels for any machine of the architecture.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "norm_act.h"

#define REVBIFPN_ISA baseline
#include "kernels/kernels.h"
