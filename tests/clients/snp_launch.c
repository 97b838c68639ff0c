/*
 * What a VMM asks and says before and at the end of an SNP guest's launch: features, policy, and an ID block that the
 * guest's owner has signed. The block is in the file that is the argument: 96 bytes, then 4096 of authentication.
 */
#define _GNU_SOURCE
#include "snp.h"

enum { GRP_SEV = 1, VMSA_FEATURES = 0, POLICY_BITS = 1, REQ_CERTS = 2, SNP_ACTIVE = 1, DEBUG_SWAP = 1 << 5 };
enum { ID_BLOCK = 96, ID_AUTH = 4096 };

static struct {
    uint8_t block[ID_BLOCK], auth[ID_AUTH];
} owners;

/* What the attribute says; -1 with errno. */
static int64_t attribute(uint32_t group, uint64_t number) {
    uint64_t value = 0;
    struct kvm_device_attr attr = {.group = group, .attr = number, .addr = (uintptr_t)&value};

    if (ioctl(kvm, KVM_HAS_DEVICE_ATTR, &attr)) return -1;
    return ioctl(kvm, KVM_GET_DEVICE_ATTR, &attr) ? -1 : (int64_t)value;
}

static void what_kvm_has(void) {
    CHECK(attribute(GRP_SEV, VMSA_FEATURES) == DEBUG_SWAP, "%#lx", (long)attribute(GRP_SEV, VMSA_FEATURES));
    CHECK(attribute(GRP_SEV, POLICY_BITS) & POLICY_RESERVED, "%#lx", (long)attribute(GRP_SEV, POLICY_BITS));
    CHECK(attribute(GRP_SEV, REQ_CERTS) == 1, "%#lx", (long)attribute(GRP_SEV, REQ_CERTS));
    CHECK_ERRNO(attribute(GRP_SEV, 3), ENXIO);
    CHECK_ERRNO(attribute(2, 0), ENXIO);
    CHECK(attribute(0, 0) == 3, "XCR0 %#lx", (long)attribute(0, 0));
}

static void initialised(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, SNP_VM);
    struct sev_init unknown = {.vmsa_features = SNP_ACTIVE}, old = {.ghcb_version = 1}, flags = {.flags = 1};
    struct sev_init init = {.vmsa_features = DEBUG_SWAP, .ghcb_version = 2};

    CHECK(!ioctl(vm, MEMORY_ENCRYPT_OP, 0), "errno %d", errno);
    CHECK_ERRNO(command(vm, INIT2, &unknown), EINVAL);
    CHECK_ERRNO(command(vm, INIT2, &old), EINVAL);
    CHECK_ERRNO(command(vm, INIT2, &flags), EINVAL);
    CHECK_ERRNO(command(vm, GUEST_STATUS, &init), ENOTTY);
    CHECK(!command(vm, INIT2, &init), "errno %d", errno);
    CHECK_ERRNO(command(vm, GUEST_STATUS, &init), EPERM);
    CHECK(!command(vm, ENABLE_REQ_CERTS, NULL), "errno %d", errno);
    close(ioctl(vm, KVM_CREATE_VCPU, 0));
    CHECK_ERRNO(command(vm, ENABLE_REQ_CERTS, NULL), EINVAL);
    close(vm);
    vm = ioctl(kvm, KVM_CREATE_VM, SNP_VM);
    close(ioctl(vm, KVM_CREATE_VCPU, 0));
    CHECK_ERRNO(command(vm, INIT2, &init), EINVAL);
    close(vm);
}

static void policies(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, SNP_VM);
    struct sev_init init = {0};
    struct launch_start start = {0}, agent = {.policy = POLICY_RESERVED | 1 << 18};
    struct launch_start later = {.policy = POLICY_RESERVED | 0x0238}; /* version 2.56 of the firmware's ABI */

    CHECK(!command(vm, INIT2, &init), "errno %d", errno);
    CHECK_ERRNO(command(vm, LAUNCH_START, &start), EINVAL);
    CHECK_ERRNO(command(vm, LAUNCH_START, &agent), EINVAL);
    CHECK_ERRNO(command(vm, LAUNCH_START, &later), EIO);
    CHECK(firmware_error == POLICY_FAILURE, "firmware says %u", firmware_error);
    start.policy = POLICY_RESERVED;
    CHECK(!command(vm, LAUNCH_START, &start), "errno %d", errno);
    CHECK_ERRNO(command(vm, LAUNCH_START, &start), EINVAL);
    close(vm);
}

/* A guest with one page, whose first byte is `image`, as far as the end of its launch. */
static int begun(uint8_t image) {
    int vm = ioctl(kvm, KVM_CREATE_VM, SNP_VM), gmem = create_gmem(vm, PAGE, 0);
    uint8_t *source = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED};
    struct launch_update update = {.uaddr = (uintptr_t)source, .len = PAGE, .type = NORMAL};

    source[0] = image;
    if (set_region(vm, 0, 0, PAGE, NULL, gmem) || command(vm, INIT2, &init) || command(vm, LAUNCH_START, &start) ||
        command(vm, LAUNCH_UPDATE, &update))
        bail_out("a launch that begins");
    munmap(source, PAGE);
    close(gmem);
    return vm;
}

static void what_its_owner_says(void) {
    struct launch_finish end = {.id_block_en = 1, .vcek_disabled = 1, .host_data = "host"}, none = {0};
    int vm = begun('x');

    CHECK_ERRNO(command(vm, LAUNCH_FINISH, &end), EINVAL); /* no addresses */
    end.id_block_uaddr = (uintptr_t)owners.block, end.id_auth_uaddr = (uintptr_t)owners.auth;
    CHECK_ERRNO(command(vm, LAUNCH_FINISH, &end), EIO);
    CHECK(firmware_error == BAD_MEASUREMENT, "another guest: firmware says %u", firmware_error);
    CHECK(!command(vm, LAUNCH_FINISH, &none), "errno %d, firmware %u", errno, firmware_error);
    close(vm);
    vm = begun('i');
    owners.auth[0x40] ^= 1;
    CHECK_ERRNO(command(vm, LAUNCH_FINISH, &end), EIO);
    CHECK(firmware_error == BAD_SIGNATURE, "firmware says %u", firmware_error);
    owners.auth[0x40] ^= 1;
    end.auth_key_en = 1;
    CHECK_ERRNO(command(vm, LAUNCH_FINISH, &end), EIO);
    CHECK(firmware_error == INVALID_PARAM, "no author: firmware says %u", firmware_error);
    end.auth_key_en = 0;
    CHECK(!command(vm, LAUNCH_FINISH, &end), "errno %d, firmware %u", errno, firmware_error);
    CHECK_ERRNO(command(vm, LAUNCH_FINISH, &end), EINVAL);
    close(vm);
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"what KVM has", what_kvm_has},
        {"initialised", initialised},
        {"policies", policies},
        {"what its owner says", what_its_owner_says},
    };
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : NULL;

    if (!file || fread(&owners, sizeof(owners), 1, file) != 1) bail_out("the file of an ID block");
    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> SNP_VM & 1)) skip_all("no SNP");
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
