/*
 * An SNP guest makes a vCPU of its own and ends it: a page of its private memory becomes a VMSA by RMPADJUST, KVM is told by
 * the GHCB, and the second vCPU begins where the page says. After the guest has ended it the page is memory again, and
 * has what the vCPU left in it.
 */
#define _GNU_SOURCE
#include "snp.h"

enum { VMSA_GPA = DATA_GPA + PAGE, GHCB_GPA = DATA_GPA + 2 * PAGE, MAILBOX_GPA = DATA_GPA + 3 * PAGE };
enum { AP_CODE = CODE + 0x800, SECRET = 0x5e };

/* Tells what RMPADJUST, the creation, the destruction and the second RMPADJUST returned, then the AP's instruction pointer. */
extern const char guest_bsp[], guest_bsp_end[], guest_ap[], guest_ap_end[];
asm(".pushsection .rodata\n"
    "guest_bsp:\n"
    "    mov $0x10ff0, %esp\n"
    "    mov $0xc0010130, %ecx\n"
    "    mov $0x12012, %eax\n" /* the GHCB is at 0x12000 */
    "    xor %edx, %edx\n"
    "    wrmsr\n"
    "    .byte 0xf3, 0x0f, 0x01, 0xd9\n" /* vmgexit */
    "    mov $0x10001, %edx\n"           /* a VMSA, VMPL1 may do nothing */
    "    call rmpadjust\n"
    "    mov $1, %ebx\n" /* AP_CREATE */
    "    call ap_creation\n"
    "    mov $2, %ebx\n" /* AP_DESTROY */
    "    call ap_creation\n"
    "    mov $1, %edx\n"
    "    call rmpadjust\n"
    "    mov 0x11178, %ax\n"
    "    out %al, $0x10\n"
    "    mov %ah, %al\n"
    "    out %al, $0x10\n"
    "    hlt\n"
    "rmpadjust:\n"
    "    mov $0x11000, %eax\n"
    "    xor %ecx, %ecx\n"
    "    .byte 0xf3, 0x0f, 0x01, 0xfe\n"
    "    out %al, $0x10\n"
    "    ret\n"
    "ap_creation:\n"
    "    mov $0x212000, %edi\n" /* the GHCB, as shared */
    "    mov $0x80000013, %eax\n"
    "    mov %rax, 0x390(%rdi)\n"
    "    mov $1, %eax\n" /* APIC id 1 */
    "    shl $32, %rax\n"
    "    or %rbx, %rax\n"
    "    mov %rax, 0x398(%rdi)\n"
    "    mov $0x11000, %eax\n"
    "    mov %rax, 0x3a0(%rdi)\n"
    "    mov $1, %eax\n" /* SEV_FEATURES */
    "    mov %rax, 0x1f8(%rdi)\n"
    "    movb $0x80, 0x3f7(%rdi)\n" /* which of these are valid */
    "    movb $0x1c, 0x3fe(%rdi)\n"
    "    mov $0xc0010130, %ecx\n"
    "    mov $0x12000, %eax\n"
    "    xor %edx, %edx\n"
    "    wrmsr\n"
    "    .byte 0xf3, 0x0f, 0x01, 0xd9\n"
    "    mov 0x398(%rdi), %eax\n"
    "    out %al, $0x10\n"
    "    ret\n"
    "guest_bsp_end:\n"
    "guest_ap:\n" /* what is in private memory goes into shared */
    "    mov 0x10000, %al\n"
    "    mov %al, 0x213000\n"
    "    out %al, $0x10\n"
    "guest_ap_end:\n"
    ".popsection\n");

/* struct sev_es_save_area, as far as a vCPU in long mode has to have it. */
static void write_vmsa(uint8_t *page) {
    enum { CS = 0x10, DATA_SEGMENTS = 5, CODE_64 = 0xa9b, DATA_32 = 0xc93, EFER_SVME = 1 << 12 };
    static const int data[DATA_SEGMENTS] = {0x00, 0x20, 0x30, 0x40, 0x50};
    struct segment {
        uint16_t selector, attributes;
        uint32_t limit;
        uint64_t base;
    } *code = (void *)(page + CS);

    *code = (struct segment){.selector = 8, .attributes = CODE_64, .limit = ~0U};
    for (int i = 0; i < DATA_SEGMENTS; i++)
        *(struct segment *)(page + data[i]) = (struct segment){.selector = 16, .attributes = DATA_32, .limit = ~0U};
    *(uint64_t *)(page + 0xd0) = EFER_LME | EFER_LMA | EFER_SVME;
    *(uint64_t *)(page + 0x148) = CR4_PAE;
    *(uint64_t *)(page + 0x150) = PML4;
    *(uint64_t *)(page + 0x158) = CR0_PE | CR0_NE | CR0_PG;
    *(uint64_t *)(page + 0x170) = 2;
    *(uint64_t *)(page + 0x178) = AP_CODE;
    *(uint64_t *)(page + 0x3b0) = 1; /* SNP is active */
}

/* The same guest through its second vCPU. */
static struct guest second_vcpu(const struct guest *g) {
    struct guest other = *g;

    other.m.vcpu = ioctl(g->m.vm, KVM_CREATE_VCPU, 1);
    if (other.m.vcpu >= 0) other.m.run = map_shared(other.m.vcpu, g->m.run_size);
    return other;
}

static void expect_told(struct guest *g, int byte) {
    uint32_t exit_ = enter(g);

    CHECK(told(g, exit_) == byte, "exit %u, %#x and not %#x", exit_, told(g, exit_), byte);
}

static void a_vcpu_of_its_own(void) {
    struct guest bsp, ap;
    uint32_t exit_;

    STEP(open_launch(&bsp, guest_bsp, guest_bsp_end));
    ap = second_vcpu(&bsp);
    CHECK(ap.m.vcpu >= 0 && ap.m.run != MAP_FAILED, "errno %d", errno);
    memcpy(bsp.m.low + AP_CODE, guest_ap, (size_t)(guest_ap_end - guest_ap));
    write_vmsa(bsp.m.low + VMSA_GPA);
    bsp.m.low[DATA_GPA] = SECRET;
    STEP(finish_launch(&bsp));

    STEP(expect_told(&bsp, 0)); /* RMPADJUST */
    STEP(expect_told(&bsp, 0)); /* AP_CREATE */
    STEP(expect_told(&ap, SECRET));
    CHECK(bsp.m.low[MAILBOX_GPA] == SECRET, "the host finds %#x", bsp.m.low[MAILBOX_GPA]);
    STEP(expect_told(&bsp, 0)); /* AP_DESTROY */
    exit_ = enter(&ap);
    CHECK(exit_ == KVM_EXIT_HLT, "a vCPU that was ended: exit %u", exit_);
    STEP(expect_told(&bsp, 0)); /* RMPADJUST: it is in use no more */
    STEP(expect_told(&bsp, (AP_CODE + (guest_ap_end - guest_ap)) & 0xff));
    STEP(expect_told(&bsp, AP_CODE >> 8));
    CHECK(access_is_refused(bsp.m.low + VMSA_GPA, -1), "the host reads a VMSA");
    munmap(ap.m.run, ap.m.run_size), close(ap.m.vcpu);
    close_guest(&bsp);
}

int main(void) {
    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> SNP_VM & 1)) skip_all("no SNP");
    begin_case();
    a_vcpu_of_its_own();
    end_case("", "a vCPU of its own");
    return finish();
}
