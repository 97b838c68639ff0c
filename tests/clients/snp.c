/*
 * An SNP guest is launched through KVM_MEMORY_ENCRYPT_OP, in place: image written while shared, made private, measured with
 * a source address of zero. It finds its image, and the host that makes a page shared again finds ciphertext.
 */
#define _GNU_SOURCE
#include "client.h"

enum { SNP_VM = 4, INIT2 = 22, LAUNCH_START = 100, LAUNCH_UPDATE = 101, LAUNCH_FINISH = 102 };
enum { NORMAL = 1, CPUID = 6, POLICY_RESERVED = 1 << 17, POLICY_FAILURE = 7, INVALID_PARAM = 0x16 };
enum { PAGES = 4, SIZE = PAGES * PAGE };

struct sev_cmd {
    uint32_t id, pad;
    uint64_t data;
    uint32_t error, sev_fd;
};
struct sev_init {
    uint64_t vmsa_features;
    uint32_t flags;
    uint16_t ghcb_version, pad1;
    uint32_t pad2[8];
};
struct launch_start {
    uint64_t policy;
    uint8_t gosvw[16];
    uint16_t flags;
    uint8_t pad0[6];
    uint64_t pad1[4];
};
struct launch_update {
    uint64_t gfn_start, uaddr, len;
    uint8_t type, pad0;
    uint16_t flags;
    uint32_t pad1;
    uint64_t pad2[4];
};
struct launch_finish {
    uint64_t id_block_uaddr, id_auth_uaddr;
    uint8_t id_block_en, auth_key_en, vcek_disabled, host_data[32], pad0[3];
    uint16_t flags;
    uint64_t pad1[4];
};
#define MEMORY_ENCRYPT_OP _IOWR(KVMIO, 0xba, unsigned long)

/* mov al, [rbx]; inc byte [rbx]; out 0x10, al */
static const uint8_t tell_and_count[] = {0x8a, 0x03, 0xfe, 0x03, 0xe6, 0x10};
static uint32_t firmware_error;

static int command(int vm, uint32_t id, void *data) {
    struct sev_cmd arguments = {.id = id, .data = (uintptr_t)data};
    int result = ioctl(vm, MEMORY_ENCRYPT_OP, &arguments);
    firmware_error = arguments.error;
    return result;
}

static int convert(int gmem, uint64_t page, uint64_t pages, bool private) {
    struct kvm_memory_attributes2 arguments = {
        .offset = page * PAGE, .size = pages * PAGE, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments);
}

static void launched_in_place(void) {
    struct machine m;
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED};
    struct launch_update update = {.gfn_start = DATA_GPA / PAGE, .len = SIZE, .type = NORMAL};
    struct launch_finish end = {0};
    uint8_t byte = 0;

    CHECK(!open_machine(&m, SNP_VM, tell_and_count, sizeof(tell_and_count)), "errno %d", errno);
    int gmem = create_gmem(m.vm, SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, SIZE, NULL, gmem), "errno %d", errno);
    uint8_t *memory = map_shared(gmem, SIZE);
    memory[0] = 41;
    CHECK_ERRNO(command(m.vm, LAUNCH_START, &start), EINVAL);
    CHECK(!command(m.vm, INIT2, &init), "errno %d", errno);
    CHECK_ERRNO(command(m.vm, INIT2, &init), EINVAL);
    CHECK(!command(m.vm, LAUNCH_START, &start), "errno %d, firmware %u", errno, firmware_error);
    CHECK_ERRNO(command(m.vm, LAUNCH_UPDATE, &update), EINVAL); /* shared */
    CHECK(!convert(gmem, 0, PAGES, true), "errno %d", errno);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_RUN, 0), EINVAL); /* not launched */
    CHECK(!command(m.vm, LAUNCH_UPDATE, &update), "errno %d, firmware %u", errno, firmware_error);
    CHECK(!update.len && update.gfn_start == DATA_GPA / PAGE + PAGES && !update.uaddr, "%lu left", (long)update.len);
    CHECK(!command(m.vm, LAUNCH_FINISH, &end), "errno %d, firmware %u", errno, firmware_error);
    CHECK_ERRNO(command(m.vm, LAUNCH_FINISH, &end), EINVAL);
    CHECK(run_guest(&m, DATA_GPA, 0, &byte) && byte == 41, "exit %u, %u", m.run->exit_reason, byte);
    CHECK(access_is_refused(memory, -1), "the host reads a private page");
    CHECK(!convert(gmem, 0, 1, false), "errno %d", errno);
    CHECK(memory[0] != 42 || memory[1] || memory[2], "plaintext");
    munmap(memory, SIZE);
    close(gmem);
    close_machine(&m);
}

static void corrected_cpuid(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, SNP_VM), gmem = create_gmem(vm, PAGE, 0);
    uint32_t *table = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED}, no_policy = {0};
    struct launch_update update = {.uaddr = (uintptr_t)table, .len = PAGE, .type = CPUID};

    table[0] = 1, table[4] = 1, table[12] = 1 << 5; /* leaf 1, ECX: VMX */
    CHECK(!set_region(vm, 0, 0, PAGE, NULL, gmem), "errno %d", errno);
    CHECK(!command(vm, INIT2, &init), "errno %d", errno);
    CHECK_ERRNO(command(vm, LAUNCH_START, &no_policy), EINVAL);
    CHECK(!command(vm, LAUNCH_START, &start), "errno %d", errno);
    CHECK_ERRNO(command(vm, LAUNCH_UPDATE, &update), EIO);
    CHECK(firmware_error == INVALID_PARAM, "firmware says %u", firmware_error);
    CHECK(table[0] == 1 && table[12] == 0, "ECX %#x", table[12]);
    CHECK(!command(vm, LAUNCH_UPDATE, &update), "errno %d, firmware %u", errno, firmware_error);
    munmap(table, PAGE);
    close(gmem), close(vm);
}

static void not_for_others(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
    struct sev_init init = {0};

    CHECK_ERRNO(command(vm, INIT2, &init), ENOTTY);
    close(vm);
}

int main(void) {
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
        {"launched in place", launched_in_place},
        {"a corrected CPUID page", corrected_cpuid},
        {"not for others", not_for_others},
    };

    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> SNP_VM & 1)) skip_all("no SNP");
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        begin_case();
        cases[i].run();
        end_case("", cases[i].name);
    }
    return finish();
}
