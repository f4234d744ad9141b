// The kernels for any machine of the architecture.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "squeeze_excite.h"

#define REVBIFPN_ISA baseline
#define REVBIFPN_REGISTER 16
#include "kernels/kernels.h"
