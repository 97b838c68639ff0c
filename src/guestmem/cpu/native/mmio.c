/* One instruction that uses MMIO, executed by Unicorn and not by a decoder of ours.
 *
 * The instruction is single-stepped while the TLB maps the missed page, for the missed kind of access only, to an area in
 * which a memory hook sees each access whole: its address, its size, its value. A write is recorded. A read whose value is
 * not known yet ends the step before the value is used, everything is rolled back, and the step is repeated when the value
 * has been given; so an instruction that reads and writes gives a read stop and then a write stop, and one that reads twice
 * gives two. Each iteration of a REP is an instruction. An access that lies in two pages, one of which is MMIO, is given
 * up. */
#include "internal.h"

#include <string.h>

static uint64_t low_bytes(uint64_t value, unsigned size)
{
    return size >= 8 ? value : value & ((1ull << size * 8) - 1);
}

/* The step is over; what it has changed is taken back. */
static void abort_step(struct cpu *cpu, enum cause cause)
{
    cpu->mmio.aborted = true;
    end_pass(cpu, cause);
}

/* An access, before Unicorn takes it to pieces. A helper goes on after the read that ends its step. */
static void on_access(uc_engine *uc, uc_mem_type kind, uint64_t address, int size, int64_t value, void *data)
{
    struct cpu *cpu = data;
    struct mmio *mmio = &cpu->mmio;
    (void)uc;
    if (cpu->cause)
        return;
    uint64_t gpa = address - MMIO_BASE;
    mmio->image = (struct mmio_access){gpa, 0, (unsigned)size};
    if (gpa % PAGE + (unsigned)size > PAGE || mmio->write_count == MMIO_WRITES)
        abort_step(cpu, CAUSE_MMIO_CROSSED);
    else if (kind != UC_MEM_READ)
        mmio->writes[mmio->write_count++] = (struct mmio_access){gpa, low_bytes((uint64_t)value, (unsigned)size), (unsigned)size};
    else if (mmio->value_next < mmio->value_count)
        mmio->image.value = low_bytes(mmio->values[mmio->value_next++], (unsigned)size);
    else
        abort_step(cpu, CAUSE_MMIO_READ);
}

/* A piece of something that was not announced belongs to an access that began in another page. */
static void check_piece(struct cpu *cpu, uint64_t gpa)
{
    const struct mmio_access *image = &cpu->mmio.image;
    uint64_t first = image->size ? image->gpa - image->gpa % image->size : 0;
    if (gpa < first || gpa >= first + 2 * image->size)
        abort_step(cpu, CAUSE_MMIO_CROSSED);
}

/* A piece of the read that on_access() saw: at most four bytes, aligned, perhaps more than was asked for. */
static uint64_t on_read(uc_engine *uc, uint64_t gpa, unsigned size, void *data)
{
    struct cpu *cpu = data;
    const struct mmio_access *image = &cpu->mmio.image;
    (void)uc;
    check_piece(cpu, gpa);
    int64_t shift = (int64_t)(gpa - image->gpa) * 8;
    if (shift <= -64 || shift >= 64)
        return 0;
    return low_bytes(shift >= 0 ? image->value >> shift : image->value << -shift, size);
}

/* A piece of the write that on_access() saw, which was told the value before MOVBE swaps its bytes. */
static void on_write(uc_engine *uc, uint64_t gpa, unsigned size, uint64_t value, void *data)
{
    struct cpu *cpu = data;
    (void)uc;
    check_piece(cpu, gpa);
    if (cpu->cause || !cpu->mmio.write_count)
        return;
    struct mmio_access *whole = &cpu->mmio.writes[cpu->mmio.write_count - 1];
    uint64_t shift = (gpa - whole->gpa) * 8, mask = low_bytes(~0ull, size);
    if (shift < 64)
        whole->value = (whole->value & ~(mask << shift)) | (value & mask) << shift;
}

bool mmio_covers(const struct cpu *cpu, uint64_t gpa)
{
    for (unsigned i = 0; i < cpu->mmio.page_count; i++)
        if (cpu->mmio.pages[i] == (gpa & PAGE_MASK))
            return true;
    return false;
}

/* Whether the next instruction is one that uses MMIO. */
bool mmio_active(const struct cpu *cpu)
{
    return cpu->mmio.page_count;
}

/* The page of `gpa` is no memory for the next instruction. The stop for what cannot be, or 0. */
int mmio_add_page(struct cpu *cpu, uint64_t gpa)
{
    struct mmio *mmio = &cpu->mmio;
    if (!mmio->mapped) {
        if (uc_mmio_map(cpu->uc, MMIO_BASE, MMIO_BASE, on_read, cpu, on_write, cpu))
            return fail(cpu, "no area for MMIO");
        mmio->mapped = true;
    }
    if (mmio_covers(cpu, gpa) || gpa >= MMIO_BASE || mmio->page_count == MMIO_PAGES)
        return fail(cpu, "an access of two pages, one of which is MMIO");
    mmio->pages[mmio->page_count++] = gpa & PAGE_MASK;
    return CPU_STOP_NONE;
}

/* The answer to the read that ended the last step. */
void mmio_supply(struct cpu *cpu, uint64_t value)
{
    if (cpu->mmio.value_count < MMIO_VALUES)
        cpu->mmio.values[cpu->mmio.value_count++] = value;
}

static void begin(struct cpu *cpu)
{
    struct mmio *mmio = &cpu->mmio;
    mmio->value_next = mmio->write_count = mmio->write_next = 0;
    mmio->image = (struct mmio_access){0, 0, 1};
    mmio->aborted = false;
    memcpy(mmio->saved, cpu->env, ENV_SIZE);
    if (!mmio->hooked)
        uc_hook_add(cpu->uc, &mmio->hook, UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, (void *)on_access, cpu, MMIO_BASE,
                    2 * MMIO_BASE - 1);
    mmio->hooked = true;
}

/* No step follows: the hook and the translations to the device must go before anything else is executed. A deleted hook
 * stays in its list until a pass ends, and code that is translated meanwhile is slow for good: a pass that does nothing
 * takes it out. */
void mmio_release(struct cpu *cpu)
{
    if (!cpu->mmio.hooked)
        return;
    uc_hook_del(cpu->uc, cpu->mmio.hook);
    cpu->mmio.hooked = false;
    sealed_pass(cpu);
}

/* The stop for the oldest write that was not reported yet, or 0. */
int mmio_next_write(struct cpu *cpu)
{
    struct mmio *mmio = &cpu->mmio;
    struct cpu_stop *stop = &cpu->block->stop;
    if (mmio->write_next >= mmio->write_count)
        return CPU_STOP_NONE;
    const struct mmio_access *write = &mmio->writes[mmio->write_next++];
    stop->gpa = write->gpa;
    stop->size = write->size;
    memcpy(stop->data, &write->value, 8);
    return CPU_STOP_MMIO_WRITE;
}

/* The instruction is done, or something else happens in its place. What it wrote is reported all the same. */
void mmio_forget(struct cpu *cpu)
{
    cpu->mmio.page_count = cpu->mmio.value_count = 0;
}

/* One step of an instruction that uses MMIO. */
int advance_mmio(struct cpu *cpu)
{
    struct mmio *mmio = &cpu->mmio;
    begin(cpu);
    int code = single_step(cpu);
    if (mmio->aborted)
        memcpy(cpu->env, mmio->saved, ENV_SIZE);
    if (cpu->cause == CAUSE_MMIO_READ) {
        cpu->block->stop.gpa = mmio->image.gpa;
        cpu->block->stop.size = mmio->image.size;
        mmio->write_count = 0;
        return CPU_STOP_MMIO_READ;
    }
    if (cpu->cause == CAUSE_MMIO_CROSSED) {
        mmio->write_count = 0;
        return fail(cpu, "an access of two pages, one of which is MMIO");
    }
    if (cpu->cause == CAUSE_PORT_IN) {
        port_roll_back(cpu);
        return fail(cpu, "INS to MMIO");
    }
    bool done = !cpu->cause && !cpu->refused.kind && code == UC_ERR_EXCEPTION && cpu->pass_end->exception_index == DB;
    if (!done)
        mmio->write_count = 0;
    int stop = judge(cpu, code, true);
    if (done || stop == CPU_STOP_PORT_OUT)
        mmio_forget(cpu);
    return done ? mmio_next_write(cpu) : stop;
}
