/* Section K: KVM ioctls on a guest_memfd, and ioctls of other kernels on a VM. */
#include "probe.h"

static const struct {
    const char *id;
    unsigned long request;
    bool on_vm;
} requests[] = {
    {"K1", 0xaeff, false},
    {"K2", 0xdeadbeef, false},
    {"K3", KVM_CHECK_EXTENSION, false},
    {"K4", CREATE_GMEM, false},
    {"K5", SET_ATTRIBUTES, false},
    {"K6", SET_ATTRIBUTES2, false},
    {"K7", SET_ATTRIBUTES, true},
    {"K8", SET_ATTRIBUTES2, true},
    {"K9", LINK_GMEM_V2, true},
    {"K10", GMEM_CONVERT_SHARED, false},
    {"K11", PRE_FAULT, true},
    {"K12", PRE_FAULT, false},
    {"K13", SET_REGION2, false},
};

static void ask_requests(void)
{
    int vm = new_vm(), gmem = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    uint64_t argument[32] = {0};
    for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++)
        row_ret(requests[i].id, ioctl(requests[i].on_vm ? vm : gmem, requests[i].request, argument));
}

static const struct group groups[] = {{"requests", ask_requests}};
SECTION(wrongfd_section, "K", groups);
