/* Names under /proc that lead to our files. */
#pragma once

#include <stdbool.h>

/* N of "/proc/self/fd/N" and of the other ways to say it, else -1. */
int name_of_descriptor(const char *path);
bool name_is_maps(const char *path); /* /proc/self/maps or smaps */
int maps_open(const char *path);     /* a copy in which guest_memfds have the name that the kernel gives them, or -1 */
