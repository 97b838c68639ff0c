/* What the kernel knows of this process's memory: its mappings. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vma {
    uintptr_t start, end;
    int protection;
    bool file_backed, shared;
};

/* The first mapping that ends after `address`. ENOENT: none; another errno: cannot be told, *vma is as it was. */
int vma_next(uintptr_t address, struct vma *vma);
