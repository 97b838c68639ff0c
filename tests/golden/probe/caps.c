/* Section C: capabilities and VM creation. */
#include "probe.h"

static const struct {
    const char *id;
    int capability;
} extensions[] = {
    {"C2", 10},  {"C3", 16},  {"C4", 81},   {"C5", 118},  {"C6", 192},  {"C7", 231},
    {"C8", 232}, {"C9", 233}, {"C10", 234}, {"C11", 235}, {"C12", 236}, {"C13", 244},
};

static void row_extension(const char *id, int kvm, int vm, long capability)
{
    int on_system = ioctl(kvm, KVM_CHECK_EXTENSION, capability);
    int on_vm = ioctl(vm, KVM_CHECK_EXTENSION, capability);
    row(id, "system fd %d, VM fd %d", on_system, on_vm);
}

/* One row asks about eleven numbers: the first that is not absent is the answer. */
static void row_absent(int kvm, int vm)
{
    long capability = 240;
    for (; capability < 251; capability++) {
        if (capability == 244)
            continue;
        if (ioctl(kvm, KVM_CHECK_EXTENSION, capability) || ioctl(vm, KVM_CHECK_EXTENSION, capability))
            break;
    }
    row_extension("C19", kvm, vm, capability);
}

static void ask_capabilities(void)
{
    int kvm = open_kvm(), vm = new_vm();
    row_ret("C1", ioctl(kvm, KVM_GET_API_VERSION, 0ul));
    for (size_t i = 0; i < sizeof(extensions) / sizeof(extensions[0]); i++)
        row_extension(extensions[i].id, kvm, vm, extensions[i].capability);
    row_absent(kvm, vm);
}

static void ask_types(void)
{
    static const char *const ids[] = {"C14", "C15", "C16", "C17", "C18"};
    int kvm = open_kvm();
    for (unsigned long type = 1; type <= 5; type++)
        row_fd(ids[type - 1], ioctl(kvm, KVM_CREATE_VM, type));
}

static const struct group groups[] = {{"capabilities", ask_capabilities}, {"types", ask_types}};
SECTION(caps_section, "C", groups);
