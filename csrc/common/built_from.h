// The digest of the sources that a library was built from (csrc/digest.py). setup.py writes it into
// a header of its own, so that only the modules are compiled anew; other builds do not know it.
#pragma once

#if __has_include("als_sources.h")
#include "als_sources.h"
#else
#define ALS_SOURCES "unknown"
#endif
