/*
 * Interrupt controllers in the kernel: what their ioctls answer, and guests that program each of them and are
 * interrupted by it: APIC timer, IPIs, INIT and SIPI, IOAPIC, PIC, PIT, MSI, irqfd with resampling, split irqchip,
 * HLT in the kernel. It passes unchanged on a real /dev/kvm.
 */
#define _GNU_SOURCE
#include "client.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <time.h>

#define TEXT(name, code)                                                                                               \
    __asm__(".pushsection .rodata\n.globl " #name "\n" #name ":\n" code "\n.globl " #name "_end\n" #name      \
            "_end:\n.popsection\n");                                                                          \
    extern const uint8_t name[], name##_end[]

/* Every handler says its vector at port 0x10 and at DATA + 16, and ends the interrupt at the APIC and at both PICs. */
TEXT(common, "pushq %rax\n movb 8(%rsp), %al\n outb %al, $0x10\n movb %al, 0x9010\n movl $0, 0xb0(%rbx)\n movb $0x20, %al\n"
             "outb %al, $0xa0\n outb %al, $0x20\n popq %rax\n addq $8, %rsp\n iretq");
#define APIC_ON "movl $0x1ff, 0x0f0(%rbx)\n movl $0x10000, 0x350(%rbx)\n"
#define WAIT "sti\n hlt\n cli\n"
#define UNTIL(vector) "sti\n 1: pause\n cmpb $" vector ", 0x9010\n jne 1b\n cli\n"
#define READY "outb %al, $0x11\n"
#define END "outb %al, $0xf4\n hlt\n"
#define PIC_ON                                                                                                         \
    "movb $0x11, %al\n outb %al, $0x20\n outb %al, $0xa0\n movb $0x20, %al\n outb %al, $0x21\n movb $0x28, %al\n"       \
    "outb %al, $0xa1\n movb $4, %al\n outb %al, $0x21\n movb $2, %al\n outb %al, $0xa1\n movb $1, %al\n"               \
    "outb %al, $0x21\n outb %al, $0xa1\n movb $0, %al\n outb %al, $0x21\n outb %al, $0xa1\n"
#define PIN_4(entry)                                                                                                   \
    "movl $0x19, 0(%rbp)\n movl $0, 0x10(%rbp)\n movl $0x18, 0(%rbp)\n movl $" entry ", 0x10(%rbp)\n"

TEXT(timer_once, APIC_ON "movl $0xb, 0x3e0(%rbx)\n movl $0x40, 0x320(%rbx)\n movl $2000000, 0x380(%rbx)\n" WAIT END);
TEXT(timer_periodic, APIC_ON "movl $0xb, 0x3e0(%rbx)\n movl $0x20041, 0x320(%rbx)\n movl $20000000, 0x380(%rbx)\n" WAIT WAIT
                                 WAIT END);
TEXT(timer_deadline, APIC_ON "movl $0x40042, 0x320(%rbx)\n rdtsc\n addl $2000000, %eax\n adcl $0, %edx\n"
                             "movl $0x6e0, %ecx\n wrmsr\n" WAIT "movl $0x6e0, %ecx\n rdmsr\n outb %al, $0x10\n" END);
TEXT(x2apic_self, "movl $0x1b, %ecx\n rdmsr\n orl $0xc00, %eax\n wrmsr\n movl $0x80f, %ecx\n movl $0x1ff, %eax\n"
                  "xorl %edx, %edx\n wrmsr\n movl $0x83f, %ecx\n movl $0x43, %eax\n wrmsr\n " UNTIL("0x43") END);
TEXT(self_ipis, APIC_ON "movl $0x40051, 0x300(%rbx)\n movl $0x40062, 0x300(%rbx)\n " UNTIL("0x51") END);
TEXT(pit_ticks, PIC_ON "movb $0x34, %al\n outb %al, $0x43\n movb $0, %al\n outb %al, $0x40\n movb $0x60, %al\n"
                       "outb %al, $0x40\n" WAIT WAIT WAIT WAIT END);
TEXT(ready_and_wait, APIC_ON READY WAIT READY WAIT END);
TEXT(edge_pin, APIC_ON PIN_4("0x44") READY WAIT END);
TEXT(level_pin, APIC_ON PIN_4("0x8045") READY WAIT END);
TEXT(start_ap, APIC_ON "movl $0x01000000, 0x310(%rbx)\n movl $0x4500, 0x300(%rbx)\n movl $0x4605, 0x300(%rbx)\n"
                       "movl $0x4605, 0x300(%rbx)\n 1: pause\n cmpb $0, 0x9000\n je 1b\n" END);
__asm__(".pushsection .rodata\n.code16\n.globl ap_code\nap_code:\n movb $1, 0x9000\n 1: cli\n hlt\n jmp 1b\n"
        ".globl ap_code_end\nap_code_end:\n.code64\n.popsection\n");
extern const uint8_t ap_code[], ap_code_end[];
TEXT(clock_page, "movl $0x4b564d01, %ecx\n movl $0x9001, %eax\n xorl %edx, %edx\n wrmsr\n nop\n" END);
/* Every word to every register of the APIC but ICR, SVR and the EOI, of the IOAPIC and of the ports. */
TEXT(rubbish, "movl $0x12345678, %eax\n movl $300, %esi\n 2: movl $0xfee00080, %edi\n"
              "1: imull $1664525, %eax, %eax\n addl $1013904223, %eax\n cmpl $0xfee00300, %edi\n je 3f\n"
              "movl %eax, (%rdi)\n movl (%rdi), %ecx\n 3: addl $0x10, %edi\n cmpl $0xfee00400, %edi\n jb 1b\n"
              "movl %eax, 0(%rbp)\n movl %eax, 0x10(%rbp)\n movl 0x10(%rbp), %ecx\n"
              "outb %al, $0x20\n outb %al, $0x21\n outb %al, $0xa0\n outb %al, $0xa1\n outb %al, $0x40\n"
              "outb %al, $0x41\n outb %al, $0x42\n outb %al, $0x43\n outb %al, $0x61\n movw $0x4d0, %dx\n outb %al, %dx\n"
              "inb $0x20, %al\n inb $0x40, %al\n inb $0x61, %al\n decl %esi\n jnz 2b\n" END);

/* In guest memory; the code is at CODE. */
enum { COMMON = 0x800, GDT = 0x900, IDT = 0x2000, STUBS = 0x3000, AP = 0x5000, STACK = 0x8000, DATA = 0x9000 };
enum { TABLES = 0xa000, SIZE = 0x10000, APIC = 0xfee00000, IOAPIC = 0xfec00000 };
enum { SAYS = 0x10, IS_READY = 0x11, ENDS = 0xf4 };

struct pc {
    int vm, vcpu;
    uint8_t *memory, said[64];
    unsigned count;
    struct kvm_run *run;
};

static int supported(int capability) { return ioctl(kvm, KVM_CHECK_EXTENSION, capability); }

static int split(int vm, uint64_t pins) {
    struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {pins}};

    return ioctl(vm, KVM_ENABLE_CAP, &cap);
}

static void set_cpuid(int vcpu) {
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } list = {.head.nent = 256};

    CHECK(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &list), "errno %d", errno);
    for (unsigned i = 0; i < list.head.nent; i++)
        if (list.entries[i].function == 1) {
            list.entries[i].ecx |= 1u << 21 | 1u << 24; /* x2APIC, TSC deadline: KVM has them whatever it lists */
            list.entries[i].edx |= 1u << 9;
        }
    CHECK(!ioctl(vcpu, KVM_SET_CPUID2, &list), "errno %d", errno);
}

static void long_mode(struct pc *pc) {
    struct kvm_sregs s;
    struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = APIC, .rbp = IOAPIC};

    CHECK(!enter_long_mode(pc->vcpu) && !ioctl(pc->vcpu, KVM_GET_SREGS, &s), "errno %d", errno);
    s.cr3 = TABLES;
    s.gdt.base = GDT;
    s.gdt.limit = 23;
    s.idt.base = IDT;
    s.idt.limit = 0xfff;
    CHECK(!ioctl(pc->vcpu, KVM_SET_SREGS, &s) && !ioctl(pc->vcpu, KVM_SET_REGS, &r), "errno %d", errno);
}

/* The first 2 MiB and those of the controllers at their own addresses. */
static void write_page_tables(uint8_t *memory) {
    uint64_t *tables = (uint64_t *)(memory + TABLES);

    tables[0] = (TABLES + 0x1000) | PTE_PRESENT | PTE_WRITE;
    tables[512] = (TABLES + 0x2000) | PTE_PRESENT | PTE_WRITE;
    tables[512 + 3] = (TABLES + 0x3000) | PTE_PRESENT | PTE_WRITE;
    tables[1024] = PTE_PRESENT | PTE_WRITE | PTE_HUGE;
    for (uint64_t at = IOAPIC; at <= APIC; at += 0x200000)
        tables[1536 + (at >> 21 & 511)] = at | PTE_PRESENT | PTE_WRITE | PTE_HUGE;
}

static void write_tables(uint8_t *memory) {
    const uint64_t gdt[] = {0, 0x00af9b000000ffff, 0x00cf93000000ffff};

    memcpy(memory + GDT, gdt, sizeof(gdt));
    memcpy(memory + COMMON, common, common_end - common);
    for (unsigned vector = 0; vector < 256; vector++) {
        uint32_t at = STUBS + 8 * vector, to = COMMON - (at + 7);
        uint64_t gate[2] = {(at & 0xffff) | 8 << 16 | 0x8e00ull << 32, 0};
        uint8_t stub[] = {0x6a, vector, 0xe9, to, to >> 8, to >> 16, to >> 24}; /* push; jmp */

        memcpy(memory + at, stub, sizeof(stub));
        memcpy(memory + IDT + 16 * vector, gate, 16);
    }
    write_page_tables(memory);
}

enum chips { FULL, WITH_PIT, SPLIT };

static void open_pc(struct pc *pc, enum chips chips, const uint8_t *code, const uint8_t *end) {
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    struct kvm_userspace_memory_region region = {.memory_size = SIZE};
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

    memset(pc, 0, sizeof(*pc));
    pc->vm = ioctl(kvm, KVM_CREATE_VM, 0);
    pc->memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    region.userspace_addr = (uint64_t)pc->memory;
    CHECK(!ioctl(pc->vm, KVM_SET_USER_MEMORY_REGION, &region), "errno %d", errno);
    CHECK(!(chips == SPLIT ? split(pc->vm, 24) : ioctl(pc->vm, KVM_CREATE_IRQCHIP, 0)), "errno %d", errno);
    CHECK(chips != WITH_PIT || !ioctl(pc->vm, KVM_CREATE_PIT2, &pit), "errno %d", errno);
    pc->vcpu = ioctl(pc->vm, KVM_CREATE_VCPU, 0);
    CHECK(pc->vcpu >= 0, "errno %d", errno);
    pc->run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, pc->vcpu, 0);
    STEP(set_cpuid(pc->vcpu));
    write_tables(pc->memory);
    memcpy(pc->memory + CODE, code, end - code);
    STEP(long_mode(pc));
}

static void close_pc(struct pc *pc) {
    munmap(pc->run, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    munmap(pc->memory, SIZE);
    close(pc->vcpu);
    close(pc->vm);
}

/* Run to the next time at which the guest is ready or ends. */
static void run_to(struct pc *pc, unsigned port) {
    for (;;) {
        CHECK(!ioctl(pc->vcpu, KVM_RUN, 0), "errno %d", errno);
        CHECK(pc->run->exit_reason == KVM_EXIT_IO, "exit %u", pc->run->exit_reason);
        if (pc->run->io.port == port) return;
        if (pc->run->io.port == 0x20 || pc->run->io.port == 0xa0) continue; /* the VMM's PICs, of which there are none */
        CHECK(pc->run->io.port == SAYS && pc->count < sizeof(pc->said), "port %#x", pc->run->io.port);
        pc->said[pc->count++] = *((uint8_t *)pc->run + pc->run->io.data_offset);
    }
}

#define CHECK_SAID(pc, ...)                                                                                            \
    do {                                                                                                               \
        const uint8_t expected_[] = {__VA_ARGS__};                                                                     \
        CHECK((pc)->count == sizeof(expected_) && !memcmp((pc)->said, expected_, sizeof(expected_)),                   \
              "%u said, the first %#x, the second %#x", (pc)->count, (pc)->said[0], (pc)->said[1]);                     \
    } while (0)

/* A guest that is interrupted without help. */
static void runs_alone(enum chips chips, const uint8_t *code, const uint8_t *end, struct pc *pc) {
    STEP(open_pc(pc, chips, code, end));
    STEP(run_to(pc, ENDS));
    close_pc(pc);
}

static void the_apic_timer(void) {
    struct pc pc;

    STEP(runs_alone(FULL, timer_once, timer_once_end, &pc));
    CHECK_SAID(&pc, 0x40);
    STEP(runs_alone(FULL, timer_periodic, timer_periodic_end, &pc));
    CHECK_SAID(&pc, 0x41, 0x41, 0x41);
    STEP(runs_alone(SPLIT, timer_once, timer_once_end, &pc));
    CHECK_SAID(&pc, 0x40);
}

static void the_tsc_deadline(void) {
    struct pc pc;

    if (!supported(KVM_CAP_TSC_DEADLINE_TIMER)) SKIP_CASE("no TSC deadline");
    STEP(runs_alone(FULL, timer_deadline, timer_deadline_end, &pc));
    CHECK_SAID(&pc, 0x42, 0);
}

static void ipis_to_oneself(void) {
    struct pc pc;

    STEP(runs_alone(FULL, self_ipis, self_ipis_end, &pc));
    CHECK_SAID(&pc, 0x62, 0x51);
}

static void the_pit_through_the_pic(void) {
    struct pc pc;
    struct timespec before, after;

    clock_gettime(CLOCK_MONOTONIC, &before);
    STEP(runs_alone(WITH_PIT, pit_ticks, pit_ticks_end, &pc));
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK_SAID(&pc, 0x20, 0x20, 0x20, 0x20);
    CHECK((after.tv_sec - before.tv_sec) * 1000000000ll + after.tv_nsec - before.tv_nsec > 80000000, "too fast");
}

static void lines_and_msis(void) {
    struct pc pc;
    struct kvm_irq_level line = {.irq = 4, .level = 1};
    struct kvm_msi msi = {.address_lo = 0xfee00000, .data = 0x50}, nobody = {.address_lo = 0xfee07000, .data = 0x50};

    STEP(open_pc(&pc, FULL, edge_pin, edge_pin_end));
    STEP(run_to(&pc, IS_READY));
    CHECK(!ioctl(pc.vm, KVM_IRQ_LINE_STATUS, &line) && line.status == 2, "status %u, errno %d", line.status, errno);
    STEP(run_to(&pc, ENDS));
    CHECK_SAID(&pc, 0x44);
    close_pc(&pc);
    STEP(open_pc(&pc, SPLIT, ready_and_wait, ready_and_wait_end));
    STEP(run_to(&pc, IS_READY));
    CHECK(ioctl(pc.vm, KVM_SIGNAL_MSI, &msi) == 1, "errno %d", errno);
    CHECK(!ioctl(pc.vm, KVM_SIGNAL_MSI, &nobody), "errno %d", errno);
    STEP(run_to(&pc, IS_READY));
    CHECK_SAID(&pc, 0x50);
    close_pc(&pc);
}

static void *write_soon(void *eventfd_) {
    uint64_t one = 1;

    usleep(20000);
    if (write(*(int *)eventfd_, &one, 8) != 8) abort();
    return NULL;
}

/* The vCPU sleeps in KVM_RUN when it comes. */
static void an_irqfd_wakes(void) {
    struct pc pc;
    pthread_t writer;
    int event = eventfd(0, EFD_CLOEXEC);
    struct kvm_irqfd irqfd = {.fd = event, .gsi = 4};

    STEP(open_pc(&pc, FULL, edge_pin, edge_pin_end));
    CHECK(!ioctl(pc.vm, KVM_IRQFD, &irqfd), "errno %d", errno);
    STEP(run_to(&pc, IS_READY));
    pthread_create(&writer, NULL, write_soon, &event);
    STEP(run_to(&pc, ENDS));
    pthread_join(writer, NULL);
    CHECK_SAID(&pc, 0x44);
    irqfd.flags = KVM_IRQFD_FLAG_DEASSIGN;
    CHECK(!ioctl(pc.vm, KVM_IRQFD, &irqfd) && !ioctl(pc.vm, KVM_IRQFD, &irqfd), "twice: errno %d", errno);
    close(event);
    close_pc(&pc);
}

static void an_irqfd_is_resampled(void) {
    struct pc pc;
    uint64_t one = 1;
    int event = eventfd(0, EFD_CLOEXEC), again = eventfd(0, EFD_CLOEXEC);
    struct kvm_irqfd irqfd = {.fd = event, .gsi = 4, .flags = KVM_IRQFD_FLAG_RESAMPLE, .resamplefd = again};
    struct pollfd ended = {.fd = again, .events = POLLIN};

    STEP(open_pc(&pc, FULL, level_pin, level_pin_end));
    CHECK(!ioctl(pc.vm, KVM_IRQFD, &irqfd), "errno %d", errno);
    STEP(run_to(&pc, IS_READY));
    CHECK(write(event, &one, 8) == 8 && !poll(&ended, 1, 0), "before the EOI");
    STEP(run_to(&pc, ENDS));
    CHECK_SAID(&pc, 0x45);
    CHECK(poll(&ended, 1, 5000) == 1, "after the EOI");
    close(event);
    close(again);
    close_pc(&pc);
}

static void route_msi(struct pc *pc, unsigned gsi, unsigned data) {
    struct {
        struct kvm_irq_routing head;
        struct kvm_irq_routing_entry entry;
    } table = {.head.nr = 1,
               .entry = {.gsi = gsi, .type = KVM_IRQ_ROUTING_MSI, .u.msi = {.address_lo = 0xfee00000, .data = data}}};

    CHECK(!ioctl(pc->vm, KVM_SET_GSI_ROUTING, &table), "errno %d", errno);
}

static void the_vmm_s_ioapic_hears_of_an_eoi(void) {
    struct pc pc;
    struct kvm_irq_level line = {.irq = 5, .level = 1};

    STEP(open_pc(&pc, SPLIT, ready_and_wait, ready_and_wait_end));
    STEP(route_msi(&pc, 5, 0x8055));
    STEP(run_to(&pc, IS_READY));
    CHECK(!ioctl(pc.vm, KVM_IRQ_LINE, &line), "errno %d", errno);
    CHECK(!ioctl(pc.vcpu, KVM_RUN, 0) && pc.run->io.port == SAYS, "errno %d", errno);
    CHECK(!ioctl(pc.vcpu, KVM_RUN, 0), "errno %d", errno);
    CHECK(pc.run->exit_reason == KVM_EXIT_IOAPIC_EOI, "exit %u", pc.run->exit_reason);
    CHECK(pc.run->eoi.vector == 0x55, "vector %#x", pc.run->eoi.vector);
    close_pc(&pc);
}

static volatile bool ap_is_done;

static void *run_ap(void *vcpu) {
    while (!ap_is_done)
        if (ioctl(*(int *)vcpu, KVM_RUN, 0) && errno != EAGAIN && errno != EINTR) abort();
    return NULL;
}

static void no_op(int signal) { (void)signal; }

static void another_processor(void) {
    struct pc pc;
    pthread_t thread;
    struct kvm_mp_state state;
    struct sigaction action = {.sa_handler = no_op};
    int ap;

    sigaction(SIGUSR1, &action, NULL);
    ap_is_done = false;
    STEP(open_pc(&pc, FULL, start_ap, start_ap_end));
    memcpy(pc.memory + AP, ap_code, ap_code_end - ap_code);
    ap = ioctl(pc.vm, KVM_CREATE_VCPU, 1);
    CHECK(!ioctl(ap, KVM_GET_MP_STATE, &state) && state.mp_state == KVM_MP_STATE_UNINITIALIZED, "%u", state.mp_state);
    pthread_create(&thread, NULL, run_ap, &ap);
    STEP(run_to(&pc, ENDS));
    usleep(10000);
    ap_is_done = true;
    pthread_kill(thread, SIGUSR1); /* it sleeps in HLT */
    pthread_join(thread, NULL);
    CHECK(!ioctl(ap, KVM_GET_MP_STATE, &state) && state.mp_state == KVM_MP_STATE_HALTED, "%u", state.mp_state);
    close(ap);
    close_pc(&pc);
}

static void kvmclock_is_written(void) {
    struct pc pc;
    uint32_t version, multiplier;

    STEP(open_pc(&pc, FULL, clock_page, clock_page_end));
    STEP(run_to(&pc, ENDS));
    memcpy(&version, pc.memory + DATA, 4);
    memcpy(&multiplier, pc.memory + DATA + 24, 4);
    CHECK(version && version % 2 == 0 && multiplier, "version %u, multiplier %#x", version, multiplier);
    close_pc(&pc);
}

static void state_is_kept(void) {
    struct pc pc;
    struct kvm_lapic_state lapic, lapic2;
    struct kvm_pit_state2 pit, pit2;
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_IOAPIC}, chip2 = chip, none = {.chip_id = 3};

    STEP(open_pc(&pc, WITH_PIT, pit_ticks, pit_ticks_end));
    CHECK(!ioctl(pc.vcpu, KVM_GET_LAPIC, &lapic), "errno %d", errno);
    lapic.regs[0x83] = 0;
    lapic.regs[0x80] = 0x20; /* TPR */
    lapic.regs[0x220] = 2;   /* IRR: vector 33 + 32 */
    CHECK(!ioctl(pc.vcpu, KVM_SET_LAPIC, &lapic) && !ioctl(pc.vcpu, KVM_GET_LAPIC, &lapic2), "errno %d", errno);
    CHECK(lapic2.regs[0x80] == 0x20 && lapic2.regs[0x220] == 2 && lapic2.regs[0x30] == 0x14, "%#x", lapic2.regs[0x30]);
    CHECK(!ioctl(pc.vm, KVM_GET_IRQCHIP, &chip), "errno %d", errno);
    chip.chip.ioapic.redirtbl[3].bits = 0x10033;
    CHECK(!ioctl(pc.vm, KVM_SET_IRQCHIP, &chip) && !ioctl(pc.vm, KVM_GET_IRQCHIP, &chip2), "errno %d", errno);
    CHECK(chip2.chip.ioapic.redirtbl[3].bits == 0x10033 && chip2.chip.ioapic.base_address == 0xfec00000, "ioapic");
    CHECK_ERRNO(ioctl(pc.vm, KVM_GET_IRQCHIP, &none), EINVAL);
    CHECK(!ioctl(pc.vm, KVM_GET_PIT2, &pit), "errno %d", errno);
    pit.channels[2].count = 1234;
    pit.channels[2].mode = 3;
    CHECK(!ioctl(pc.vm, KVM_SET_PIT2, &pit) && !ioctl(pc.vm, KVM_GET_PIT2, &pit2), "errno %d", errno);
    CHECK(pit2.channels[2].count == 1234 && pit2.channels[2].mode == 3, "count %u", pit2.channels[2].count);
    close_pc(&pc);
}

static void rubbish_in_every_register(void) {
    struct pc pc;

    STEP(open_pc(&pc, WITH_PIT, rubbish, rubbish_end));
    STEP(run_to(&pc, ENDS));
    close_pc(&pc);
}

static void the_order_of_start(void) {
    struct kvm_pit_config pit = {0};
    struct kvm_msi msi = {.address_lo = 0xfee00000};
    struct kvm_irq_routing none = {0};
    struct kvm_irq_level line = {0};
    struct kvm_irqfd irqfd = {.fd = eventfd(0, EFD_CLOEXEC)};
    struct kvm_pit_state2 state;
    struct kvm_lapic_state lapic;
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu;

    CHECK_ERRNO(ioctl(vm, KVM_CREATE_PIT2, &pit), ENOENT);
    CHECK_ERRNO(ioctl(vm, KVM_SIGNAL_MSI, &msi), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_SET_GSI_ROUTING, &none), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_IRQ_LINE, &line), ENXIO);
    CHECK_ERRNO(ioctl(vm, KVM_IRQFD, &irqfd), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_GET_PIT2, &state), ENXIO);
    CHECK_ERRNO(split(vm, 5000), EINVAL);
    CHECK(!split(vm, 0), "errno %d", errno);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_IRQCHIP, 0), EEXIST);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_PIT2, &pit), ENOENT);
    CHECK(!ioctl(vm, KVM_IRQ_LINE, &line), "errno %d", errno);
    CHECK_ERRNO(ioctl(vm, KVM_SIGNAL_MSI, &msi), EPERM); /* there is no vCPU */
    close(vm);
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_IRQCHIP, 0), EINVAL);
    CHECK_ERRNO(split(vm, 24), EEXIST);
    CHECK_ERRNO(ioctl(vm, KVM_SET_BOOT_CPU_ID, 0), EBUSY);
    CHECK_ERRNO(ioctl(vcpu, KVM_GET_LAPIC, &lapic), EINVAL);
    close(vcpu);
    close(vm);
    close(irqfd.fd);
}

static void bad_routes(void) {
    static const struct {
        unsigned gsi, type, flags, chip, pin;
    } rows[] = {
        {0, KVM_IRQ_ROUTING_IRQCHIP, 0, 2, 24}, {0, KVM_IRQ_ROUTING_IRQCHIP, 0, 0, 8},
        {0, KVM_IRQ_ROUTING_IRQCHIP, 0, 3, 0},  {0, KVM_IRQ_ROUTING_IRQCHIP, 1, 2, 0},
        {4096, KVM_IRQ_ROUTING_MSI, 0, 0, 0},   {0, KVM_IRQ_ROUTING_MSI, 2, 0, 0},
        {0, 77, 0, 0, 0},
    };
    struct {
        struct kvm_irq_routing head;
        struct kvm_irq_routing_entry entries[2];
    } table = {.head.nr = 1};
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);

    CHECK(!ioctl(vm, KVM_CREATE_IRQCHIP, 0), "errno %d", errno);
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
        table.entries[0] = (struct kvm_irq_routing_entry){.gsi = rows[i].gsi, .type = rows[i].type, .flags = rows[i].flags};
        table.entries[0].u.irqchip.irqchip = rows[i].chip;
        table.entries[0].u.irqchip.pin = rows[i].pin;
        CHECK(ioctl(vm, KVM_SET_GSI_ROUTING, &table) == -1 && errno == EINVAL, "row %zu: errno %d", i, errno);
    }
    table.head.nr = 2;
    memset(table.entries, 0, sizeof(table.entries));
    table.entries[0].type = table.entries[1].type = KVM_IRQ_ROUTING_MSI;
    CHECK_ERRNO(ioctl(vm, KVM_SET_GSI_ROUTING, &table), EINVAL);
    table.head.nr = 5000;
    CHECK_ERRNO(ioctl(vm, KVM_SET_GSI_ROUTING, &table), EINVAL);
    table.head = (struct kvm_irq_routing){.flags = 1};
    CHECK_ERRNO(ioctl(vm, KVM_SET_GSI_ROUTING, &table), EINVAL);
    table.head.flags = 0;
    CHECK(!ioctl(vm, KVM_SET_GSI_ROUTING, &table), "none: errno %d", errno);
    close(vm);
}

static void bad_irqfds(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), event = eventfd(0, EFD_CLOEXEC), closed = dup(event), file = open("/dev/null", O_RDWR);
    struct kvm_irqfd irqfd = {.fd = closed, .gsi = 4};

    close(closed);
    CHECK(!split(vm, 24), "errno %d", errno);
    CHECK_ERRNO(ioctl(vm, KVM_IRQFD, &irqfd), EBADF);
    irqfd.fd = file;
    CHECK_ERRNO(ioctl(vm, KVM_IRQFD, &irqfd), EINVAL);
    irqfd.fd = event;
    irqfd.flags = 4;
    CHECK_ERRNO(ioctl(vm, KVM_IRQFD, &irqfd), EINVAL);
    irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
    irqfd.resamplefd = eventfd(0, EFD_CLOEXEC); /* the IOAPIC is the VMM's: it hears of no EOI */
    CHECK_ERRNO(ioctl(vm, KVM_IRQFD, &irqfd), EINVAL);
    close(irqfd.resamplefd);
    irqfd.flags = 0;
    CHECK(!ioctl(vm, KVM_IRQFD, &irqfd), "errno %d", errno);
    irqfd.gsi = 5;
    CHECK_ERRNO(ioctl(vm, KVM_IRQFD, &irqfd), EBUSY);
    close(event);
    close(file);
    close(vm);
}

static void interrupts_of_the_vmm(void) {
    struct pc pc;
    struct kvm_interrupt vector = {.irq = 0x33}, beyond = {.irq = 256};

    STEP(open_pc(&pc, FULL, ready_and_wait, ready_and_wait_end));
    CHECK_ERRNO(ioctl(pc.vcpu, KVM_INTERRUPT, &vector), ENXIO);
    close_pc(&pc);
    STEP(open_pc(&pc, SPLIT, ready_and_wait, ready_and_wait_end));
    CHECK_ERRNO(ioctl(pc.vcpu, KVM_INTERRUPT, &beyond), EINVAL);
    CHECK(!ioctl(pc.vcpu, KVM_INTERRUPT, &vector), "errno %d", errno);
    CHECK_ERRNO(ioctl(pc.vcpu, KVM_INTERRUPT, &vector), EEXIST);
    close_pc(&pc);
}

static void x2apic_mode(void) {
    struct pc pc;

    STEP(open_pc(&pc, FULL, x2apic_self, x2apic_self_end));
    CHECK(!ioctl(pc.vcpu, KVM_RUN, 0), "errno %d", errno);
    CHECK(pc.run->exit_reason == KVM_EXIT_IO && pc.run->io.port == SAYS, "exit %u", pc.run->exit_reason);
    CHECK(*((uint8_t *)pc.run + pc.run->io.data_offset) == 0x43, "vector");
    CHECK(pc.run->apic_base == 0xfee00d00, "apic_base %#llx", (unsigned long long)pc.run->apic_base);
    close_pc(&pc);
}

static const struct test_case cases[] = {
    {"the order of start", the_order_of_start},
    {"bad routes", bad_routes},
    {"bad irqfds", bad_irqfds},
    {"interrupts of the VMM", interrupts_of_the_vmm},
    {"state is kept", state_is_kept},
    {"the APIC timer", the_apic_timer},
    {"the TSC deadline", the_tsc_deadline},
    {"x2APIC mode", x2apic_mode},
    {"IPIs to oneself", ipis_to_oneself},
    {"the PIT through the PIC", the_pit_through_the_pic},
    {"lines and MSIs", lines_and_msis},
    {"an irqfd wakes", an_irqfd_wakes},
    {"an irqfd is resampled", an_irqfd_is_resampled},
    {"the VMM's IOAPIC hears of an EOI", the_vmm_s_ioapic_hears_of_an_eoi},
    {"another processor", another_processor},
    {"kvmclock is written", kvmclock_is_written},
    {"rubbish in every register", rubbish_in_every_register},
};

int main(void) {
    open_kvm();
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
