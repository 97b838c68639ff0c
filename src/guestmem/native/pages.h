/* What the kernel knows of this process's memory: its mappings, and which pages of them have contents. */
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

enum { PAGE_RUNS = 64 };

struct page_run {
    uint64_t start, end, categories;
};

/* The runs of pages that have contents, in memory or swap, other than the zero page. */
struct page_runs {
    uintptr_t at, end;
    int pagemap; /* /proc/self/pagemap or -1 */
    struct page_run found[PAGE_RUNS];
    long count, next;
};

void page_runs_begin(struct page_runs *runs, const void *address, size_t length);
bool page_runs_next(struct page_runs *runs, uintptr_t *start, uintptr_t *end);
void page_runs_end(struct page_runs *runs);
