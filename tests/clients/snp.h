/* KVM_MEMORY_ENCRYPT_OP on an SNP VM, as arch/x86/include/uapi/asm/kvm.h has it, and a guest that is launched with it. */
#ifndef SNP_H
#define SNP_H

#include "protected.h"

enum { SNP_VM = 4, GUEST_STATUS = 16, INIT2 = 22, LAUNCH_START = 100, LAUNCH_UPDATE, LAUNCH_FINISH, ENABLE_REQ_CERTS };
enum { NORMAL = 1, CPUID = 6, POLICY_RESERVED = 1 << 17 };
enum { C_BIT_POSITION = 51 };
#define C_BIT (1ULL << C_BIT_POSITION)
enum { POLICY_FAILURE = 7, BAD_SIGNATURE = 0xa, BAD_MEASUREMENT = 0xb, INVALID_PARAM = 0x16 };

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

static uint32_t firmware_error;

static inline int command(int vm, uint32_t id, void *data) {
    struct sev_cmd arguments = {.id = id, .data = (uintptr_t)data};
    int result = ioctl(vm, MEMORY_ENCRYPT_OP, &arguments);
    firmware_error = arguments.error;
    return result;
}

/* Make pages private and measure them. */
static inline int measure(struct guest *g, uint64_t gpa, uint64_t size) {
    struct launch_update update = {.gfn_start = gpa / PAGE, .len = size, .type = NORMAL};

    return convert(g->gmem, gpa, size, true) || command(g->m.vm, LAUNCH_UPDATE, &update) ? -1 : 0;
}

/* A guest with this code that is being launched, all of it still shared; in a case. */
static inline void open_launch(struct guest *g, const char *code, const char *code_end) {
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED};

    CHECK(!open_guest(g, SNP_VM, C_BIT, 0), "errno %d", errno);
    memcpy(g->m.low + CODE, code, (size_t)(code_end - code));
    CHECK(!command(g->m.vm, INIT2, &init), "errno %d", errno);
    CHECK(!start_vcpu(g), "errno %d", errno);
    CHECK(!command(g->m.vm, LAUNCH_START, &start), "errno %d, firmware %u", errno, firmware_error);
}

/* All but the last two data pages become private; in a case. */
static inline void finish_launch(struct guest *g) {
    struct launch_finish end = {0};

    CHECK(!measure(g, 0, MEASURED), "errno %d, firmware %u", errno, firmware_error);
    CHECK(!measure(g, DATA_GPA, 2 * PAGE), "errno %d, firmware %u", errno, firmware_error);
    CHECK(!command(g->m.vm, LAUNCH_FINISH, &end), "errno %d, firmware %u", errno, firmware_error);
}

#endif
