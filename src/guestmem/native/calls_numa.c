/* NUMA policies. Until Linux 6.18 a policy belongs to one mapping of a guest_memfd; since then to the file, as it does with
 * the memfd behind ours. There are no functions of these names in libc: programs come by syscall(). */
#define _GNU_SOURCE
#include "shim.h"

#include <linux/mempolicy.h>

#include "calls.h"

/* A file system of their own came with the policies of files. */
static bool policy_of_mapping(const void *address, size_t length)
{
    return process.active && !process.gmem_magic && areas_touch(address, length, AREA_GMEM);
}

long call_mbind(void *address, size_t length, int mode, const void *nodes, unsigned long count, unsigned flags)
{
    long result = sys(SYS_mbind, address, length, mode, nodes, count, flags);
    if (result || !policy_of_mapping(address, length))
        return result;
    if (mode == MPOL_DEFAULT)
        areas_remove(address, length, AREA_BOUND);
    else
        areas_add(address, length, AREA_BOUND);
    return 0;
}

/* A mapping that mbind() was not called for does not have the policy that another has. */
long call_get_mempolicy(int *mode, void *nodes, unsigned long count, void *address, unsigned flags)
{
    static const int default_mode = MPOL_DEFAULT;
    long result = sys(SYS_get_mempolicy, mode, nodes, count, address, flags);
    if (result || flags != MPOL_F_ADDR || !policy_of_mapping(address, 1) || areas_touch(address, 1, AREA_BOUND))
        return result;
    return mode && copy_to_client(mode, &default_mode, sizeof(default_mode)) ? -EFAULT : 0;
}
