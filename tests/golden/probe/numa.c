/* Section P: NUMA policy. libnuma is not the C library, so all three calls go through syscall(). */
#include "probe.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>

static void row_policy(const char *id, void *address)
{
    int mode = -1;
    long result = syscall(SYS_get_mempolicy, &mode, NULL, 0ul, address, (unsigned long)MPOL_F_ADDR);
    row(id, "%s mode=%d", answer(result), mode);
}

static void ask_policy(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE), *second = map_shared(fd, FILE_SIZE);
    unsigned long nodes = 1;
    row_policy("P1", map);
    row_ret("P2", syscall(SYS_mbind, map, FILE_SIZE, (unsigned long)MPOL_BIND, &nodes, 64ul, 0u));
    row_policy("P3", map);
    row_policy("P4", second);
}

static void row_move(const char *id, void *page, const int *node)
{
    int status = -1;
    long result = syscall(SYS_move_pages, 0, 1ul, &page, node, &status, MPOL_MF_MOVE);
    row(id, "%s status=%d", answer(result), status);
}

static void ask_move(void)
{
    char *map = map_shared(new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH), FILE_SIZE);
    int here = 0;
    touch_write(map, 1);
    row_move("P5", map, NULL);
    row_move("P6", map, &here);
}

static const struct group groups[] = {{"policy", ask_policy}, {"move", ask_move}};
SECTION(numa_section, "P", groups);
