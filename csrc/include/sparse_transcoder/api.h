// What the shared library exports: everything else in it is hidden.
#pragma once

#define SPARSE_TRANSCODER_API __attribute__((visibility("default")))
