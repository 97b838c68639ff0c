/* One instruction that uses MMIO, executed by Unicorn and not by a decoder of ours.
 *
 * The instruction is single-stepped (RFLAGS.TF) while the TLB maps the missed page, for the missed kind of access only, to an
 * area in which a memory hook sees each access whole: its address, its size, its value. A write is recorded. A read whose value
 * is not known yet ends the step before the value is used, everything is rolled back, and the step is repeated when the value
 * has been given; so an instruction that reads and writes gives a read exit and then a write exit, and one that reads twice
 * gives two. Each iteration of a REP is an instruction. An access that lies in two pages, one of which is MMIO, is given up. */
#include <string.h>

#include "inside.h"

static uint64_t mask_of(unsigned size)
{
    return size >= 8 ? ~0ULL : (1ULL << size * 8) - 1;
}

/* What was aborted is taken back. */
static void abort_step(struct cpu *cpu, enum cause cause)
{
    cpu->mmio.aborted = true;
    if (cpu->cause == NO_CAUSE)
        cpu->cause = cause;
    uc_emu_stop(cpu->uc);
}

/* ---- hooks */

static void record(struct cpu *cpu, uint64_t gpa, unsigned size, uint64_t value)
{
    struct mmio *mmio = &cpu->mmio;
    if (mmio->write_count == MMIO_WRITES) {
        abort_step(cpu, CAUSE_MMIO_CROSSED);
        return;
    }
    mmio->writes[mmio->write_count++] = (struct mmio_write){gpa, value & mask_of(size), size};
}

/* An access, before Unicorn takes it to pieces. A helper goes on after the read that ends its step. */
static void on_access(uc_engine *uc, uc_mem_type type, uint64_t address, int size, int64_t value, void *data)
{
    struct cpu *cpu = data;
    struct mmio *mmio = &cpu->mmio;
    uint64_t gpa = address - MMIO_BASE;
    (void)uc;
    if (cpu->cause != NO_CAUSE)
        return;
    mmio->image_gpa = gpa;
    mmio->image_size = (uint32_t)size;
    mmio->image_value = 0;
    if ((gpa & (PAGE - 1)) + (unsigned)size > PAGE) {
        abort_step(cpu, CAUSE_MMIO_CROSSED);
    } else if (type != UC_MEM_READ) {
        record(cpu, gpa, (unsigned)size, (uint64_t)value);
    } else if (mmio->next < mmio->value_count) {
        mmio->image_value = mmio->values[mmio->next++] & mask_of((unsigned)size);
    } else {
        mmio->read = (struct mmio_write){gpa, 0, (uint32_t)size};
        abort_step(cpu, CAUSE_MMIO_READ);
    }
}

/* A piece of something that was not announced belongs to an access that began in another page. */
static void check_piece(struct cpu *cpu, uint64_t gpa)
{
    const struct mmio *mmio = &cpu->mmio;
    uint64_t first = mmio->image_gpa - mmio->image_gpa % mmio->image_size;
    if (gpa < first || gpa >= first + 2 * mmio->image_size)
        abort_step(cpu, CAUSE_MMIO_CROSSED);
}

/* A piece of the read that on_access() saw: at most four bytes, aligned, perhaps more than was asked for. */
static uint64_t on_read(uc_engine *uc, uint64_t gpa, unsigned size, void *data)
{
    struct cpu *cpu = data;
    (void)uc;
    check_piece(cpu, gpa);
    int64_t shift = (int64_t)(gpa - cpu->mmio.image_gpa) * 8;
    uint64_t value = cpu->mmio.image_value;
    if (shift >= 64 || shift <= -64)
        return 0;
    return (shift >= 0 ? value >> shift : value << -shift) & mask_of(size);
}

/* A piece of the write that on_access() saw, which was told the value before MOVBE swaps its bytes. */
static void on_write(uc_engine *uc, uint64_t gpa, unsigned size, uint64_t value, void *data)
{
    struct cpu *cpu = data;
    struct mmio *mmio = &cpu->mmio;
    (void)uc;
    check_piece(cpu, gpa);
    if (cpu->cause != NO_CAUSE || !mmio->write_count)
        return;
    struct mmio_write *whole = &mmio->writes[mmio->write_count - 1];
    uint64_t shift = (gpa - whole->gpa) * 8, mask = mask_of(size);
    if (shift < 64)
        whole->value = (whole->value & ~(mask << shift)) | (value & mask) << shift;
}

/* ---- the instruction */

static bool map_area(struct cpu *cpu)
{
    if (!cpu->mmio.mapped)
        cpu->mmio.mapped = !uc_mmio_map(cpu->uc, MMIO_BASE, MMIO_BASE, on_read, cpu, on_write, cpu);
    return cpu->mmio.mapped;
}

void mmio_begin_instruction(struct cpu *cpu)
{
    cpu->mmio.active = true;
}

void mmio_supply(struct cpu *cpu, uint64_t value)
{
    if (cpu->mmio.value_count < MMIO_VALUES)
        cpu->mmio.values[cpu->mmio.value_count++] = value;
}

void mmio_forget(struct cpu *cpu)
{
    cpu->mmio.active = false;
    cpu->mmio.value_count = 0;
}

/* No step follows: the hook and the translations to the device must go before anything else is executed. A deleted hook stays
 * in its list until a pass ends, and code that is translated meanwhile is slow for good: a pass that does nothing takes it out.
 */
void mmio_release(struct cpu *cpu)
{
    if (!cpu->mmio.hooked)
        return;
    uc_hook_del(cpu->uc, cpu->mmio.hook);
    cpu->mmio.hooked = false;
    sealed_pass(cpu);
}

int mmio_next_write(struct cpu *cpu)
{
    struct mmio *mmio = &cpu->mmio;
    if (mmio->write_next >= mmio->write_count)
        return CPU_STOP_NONE;
    const struct mmio_write *write = &mmio->writes[mmio->write_next++];
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_MMIO_WRITE);
    stop->gpa = write->gpa;
    stop->size = write->size;
    memcpy(stop->data, &write->value, sizeof(write->value));
    return CPU_STOP_MMIO_WRITE;
}

static int begin(struct cpu *cpu)
{
    struct mmio *mmio = &cpu->mmio;
    mmio->next = 0;
    mmio->image_gpa = mmio->image_value = 0;
    mmio->image_size = 1;
    mmio->aborted = false;
    mmio->write_count = mmio->write_next = 0;
    if (!mmio->hooked) {
        mmio->hooked = !uc_hook_add(cpu->uc, &mmio->hook, UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, (void *)on_access, cpu,
                                    MMIO_BASE, 2 * MMIO_BASE - 1);
        tlb_flush(cpu);
    }
    return map_area(cpu) && mmio->hooked;
}

static int read_stop(struct cpu *cpu)
{
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_MMIO_READ);
    stop->gpa = cpu->mmio.read.gpa;
    stop->size = cpu->mmio.read.size;
    return CPU_STOP_MMIO_READ;
}

int mmio_advance(struct cpu *cpu)
{
    struct mmio *mmio = &cpu->mmio;
    if (!begin(cpu))
        return stop_failed(cpu, "no memory for MMIO");
    uint8_t before[ENV_SIZE];
    memcpy(before, cpu->at.env, ENV_SIZE);
    int code = cpu_step(cpu);
    if (code < 0) /* kicked while it waited to be alone */
        return CPU_STOP_NONE;
    if (mmio->aborted)
        memcpy(cpu->at.env, before, ENV_SIZE);
    if (cpu->cause == CAUSE_PORT_IN) {
        port_in_stop(cpu);
        return stop_failed(cpu, "INS to MMIO");
    }
    if (cpu->cause == CAUSE_MMIO_READ)
        return read_stop(cpu);
    bool done = cpu->cause == NO_CAUSE && cpu->refused.why == NOT_REFUSED && code == UC_ERR_EXCEPTION && cpu->exception == DB;
    int stop = cpu_judge(cpu, code, true);
    if (done || stop == CPU_STOP_PORT_OUT)
        mmio_forget(cpu);
    return done ? mmio_next_write(cpu) : stop;
}
