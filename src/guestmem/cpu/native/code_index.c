/* Which CPUs of a VM have translated code of a host page. One page of the table for each page that was ever executed. */
#include "internal.h"

#include <stdlib.h>

struct executed {
    uint64_t hva; /* 0: free */
    uint64_t executors;
};

struct code_index {
    pthread_mutex_t lock; /* of all */
    struct executed *pages;
    unsigned bits, used;
};

struct code_index *code_index_create(void)
{
    struct code_index *index = calloc(1, sizeof *index);
    if (!index)
        return NULL;
    index->bits = 10;
    index->pages = calloc(1u << index->bits, sizeof *index->pages);
    pthread_mutex_init(&index->lock, NULL);
    if (index->pages)
        return index;
    free(index);
    return NULL;
}

void code_index_destroy(struct code_index *index)
{
    pthread_mutex_destroy(&index->lock);
    free(index->pages);
    free(index);
}

static struct executed *place_of(struct code_index *index, uint64_t hva)
{
    unsigned mask = (1u << index->bits) - 1, i = (unsigned)((hva / PAGE * 0x9e3779b97f4a7c15ull) >> (64 - index->bits));
    while (index->pages[i].hva && index->pages[i].hva != hva)
        i = (i + 1) & mask;
    return &index->pages[i];
}

static bool grow(struct code_index *index)
{
    struct executed *old = index->pages;
    unsigned count = 1u << index->bits;
    struct executed *pages = calloc((size_t)count * 2, sizeof *pages);
    if (!pages)
        return false;
    index->pages = pages;
    index->bits++;
    for (unsigned i = 0; i < count; i++)
        if (old[i].hva)
            *place_of(index, old[i].hva) = old[i];
    free(old);
    return true;
}

uint64_t code_executors(struct code_index *index, uint64_t hva)
{
    pthread_mutex_lock(&index->lock);
    uint64_t executors = place_of(index, hva)->executors;
    pthread_mutex_unlock(&index->lock);
    return executors;
}

void code_add_executor(struct code_index *index, uint64_t hva, uint64_t bit)
{
    pthread_mutex_lock(&index->lock);
    struct executed *page = place_of(index, hva);
    if (!page->hva) {
        if (++index->used > 1u << (index->bits - 1) && grow(index))
            page = place_of(index, hva);
        page->hva = hva;
    }
    page->executors |= bit;
    pthread_mutex_unlock(&index->lock);
}

/* Leaves those of `keep`; who they were before. */
uint64_t code_keep_executors(struct code_index *index, uint64_t hva, uint64_t keep)
{
    pthread_mutex_lock(&index->lock);
    struct executed *page = place_of(index, hva);
    uint64_t executors = page->executors;
    page->executors &= keep;
    pthread_mutex_unlock(&index->lock);
    return executors;
}
