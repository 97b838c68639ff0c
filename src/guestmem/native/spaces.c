/* Stage 2 of each VM, as far as it is known in this process: leaves that the server has sent with an entry into the guest,
 * and that it takes back by a drop. The two come on channels of different threads. So each list of leaves says of which
 * generation it is, a drop begins the next, and leaves of a former generation are not installed: the access is a miss then,
 * and asks again.
 *
 * What leaves of a guest_memfd point to are aliases: mappings of our own, guarded by the process's userfaultfd as the
 * client's are, so that no vCPU reaches a page that the server has closed, whatever it has cached. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vcpu.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct space *spaces; /* by `lock`; found without it */

static struct space *find(uint64_t vm)
{
    struct space *space = __atomic_load_n(&spaces, __ATOMIC_ACQUIRE);
    while (space && space->vm != vm)
        space = space->next;
    return space;
}

static struct space *make(uint64_t vm)
{
    struct space *space = calloc(1, sizeof(*space));
    if (!space || !(space->leaves = library.space_create())) {
        free(space);
        return NULL;
    }
    space->vm = vm;
    pthread_mutex_init(&space->lock, NULL);
    space->next = spaces;
    __atomic_store_n(&spaces, space, __ATOMIC_RELEASE);
    return space;
}

struct space *space_of(uint64_t vm)
{
    pthread_mutex_lock(&lock);
    struct space *space = find(vm);
    if (!space)
        space = make(vm);
    pthread_mutex_unlock(&lock);
    return space;
}

static int install(struct space *space, const struct leaf *leaf)
{
    if (leaf->flags & LEAF_MMIO)
        return library.space_map_mmio(space->leaves, leaf->gfn, leaf->count);
    return library.space_map(space->leaves, leaf->gfn, leaf->count, leaf->kinds, leaf->hva, leaf->flags & LEAF_WRITABLE);
}

int space_install(struct space *space, uint64_t generation, const struct leaf *leaves, size_t count)
{
    int error = 0;
    pthread_mutex_lock(&space->lock);
    if (generation >= space->generation)
        for (size_t i = 0; i < count && !error; i++)
            error = install(space, &leaves[i]);
    pthread_mutex_unlock(&space->lock);
    return error;
}

/* The lock is not held while vCPUs are waited for: one of them may be blocked in a fault of the client's own memory. */
static void drop(struct space *space, uint64_t generation, const struct frames *frames, size_t count)
{
    pthread_mutex_lock(&space->lock);
    if (space->generation < generation)
        space->generation = generation;
    for (size_t i = 0; i + 1 < count; i++)
        library.space_drop(space->leaves, frames[i].gfn, frames[i].count, frames[i].kinds, false);
    pthread_mutex_unlock(&space->lock);
    if (count) /* what has gone before is waited for with the last */
        library.space_drop(space->leaves, frames[count - 1].gfn, frames[count - 1].count, frames[count - 1].kinds, true);
}

int space_drop(const unsigned char *payload, size_t length)
{
    struct drop head;
    if (length < sizeof(head))
        return EPROTO;
    memcpy(&head, payload, sizeof(head));
    if (length != sizeof(head) + head.frames * sizeof(struct frames) + head.zaps * sizeof(struct range))
        return EPROTO;
    const struct frames *frames = (const struct frames *)(payload + sizeof(head));
    struct space *space = find(head.vm);
    if (space)
        drop(space, head.generation, frames, head.frames);
    return zap_ranges((const unsigned char *)(frames + head.frames), head.zaps * sizeof(struct range));
}

/* Closed until the server has registered it, and never locked into memory as a whole. */
int alias_map(int fd, uint64_t offset, uint64_t size, uint64_t *address)
{
    long place = sys(SYS_mmap, 0, size, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, offset);
    if (is_error(place))
        return (int)-place;
    sys(SYS_munlock, place, size);
    sys(SYS_madvise, place, size, MADV_DONTFORK);
    long error = sys(SYS_mprotect, place, size, PROT_READ | PROT_WRITE);
    if (error) {
        sys(SYS_munmap, place, size);
        return (int)-error;
    }
    *address = (uint64_t)place;
    return 0;
}

void space_forget(uint64_t vm)
{
    vcpus_forget(vm);
    pthread_mutex_lock(&lock);
    for (struct space **at = &spaces; *at; at = &(*at)->next) {
        struct space *space = *at;
        if (space->vm != vm)
            continue;
        __atomic_store_n(at, space->next, __ATOMIC_RELEASE);
        library.space_destroy(space->leaves);
        free(space);
        break;
    }
    pthread_mutex_unlock(&lock);
}

void spaces_lock(void)
{
    pthread_mutex_lock(&lock);
}

void spaces_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

/* A child has none of its parent's VMs. */
void spaces_after_fork(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    spaces = NULL;
    vcpus_after_fork();
}
