/* ioctl(): what it is all for. */
#define _GNU_SOURCE
#include "shim.h"

#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <sys/ioctl.h>

#include "calls.h"
#include "vcpu.h"

enum { TYPE_KVM = 0xAE, TYPE_GMEM = 0xAF, TYPE_GUP_TEST = 'g', TYPE_IOMMU = ';', TYPE_USERFAULTFD = 0xAA };
enum { FD_AT = 4 }; /* where a structure of /dev/liveupdate has its descriptor */


/* Some files are known by their number, others are found when an ioctl of ours is tried on them. */
static bool could_be_for_us(int fd, unsigned long request)
{
    unsigned type = request >> 8 & 0xff;
    return type == TYPE_KVM || type == TYPE_GMEM || type == TYPE_GUP_TEST || type == TYPE_IOMMU || file_marked(fd);
}

/* Those that the kernel answers for every file. */
static bool is_for_any_file(unsigned long request)
{
    switch (request) {
    case FIOCLEX:
    case FIONCLEX:
    case FIONBIO:
    case FIOASYNC:
    case FIGETBSZ:
    case FS_IOC_FIEMAP:
        return true;
    default:
        return false;
    }
}

static long call_ioctl(struct call *call, const struct file *file, unsigned long request, uintptr_t argument)
{
    call->request = (struct wire_request){.op = OP_IOCTL, .file = file->id, .a = request, .b = argument};
    int error = call_server(call);
    if (error)
        return -error;
    if (call->fd < 0)
        return call->answer.value;
    file_made(call->fd, KIND_NONE);
    if (call->answer.a & ANSWER_FD_IN_ARGUMENT)
        return copy_to_client((char *)argument + FD_AT, &call->fd, sizeof(call->fd)) ? -EFAULT : call->answer.value;
    return call->fd;
}

/* The structures of iommufd and VFIO say their size themselves; what is no memory the server finds out. */
enum { LARGEST_STRUCTURE = 256 };

static size_t iommu_structure(const void *argument)
{
    uint32_t size;
    if (copy_from_client(&size, argument, sizeof(size)) || size > LARGEST_STRUCTURE)
        return 0;
    return size;
}

static long file_call(const struct file *file, unsigned long request, uintptr_t argument)
{
    struct call call = {.reply = (void *)argument};
    bool is_question = request == KVM_MEMORY_ENCRYPT_OP && !argument;
    if (_IOC_DIR(request) & _IOC_WRITE && !is_question) {
        call.payload = (const void *)argument;
        call.payload_length = _IOC_SIZE(request);
    }
    if (file->kind == KIND_IOMMU || file->kind == KIND_VFIO) {
        call.payload = (const void *)argument;
        call.payload_length = iommu_structure((const void *)argument);
    }
    return call_ioctl(&call, file, request, argument);
}

/* Others wait while a thread is in KVM_RUN, as for vcpu->mutex. */
static long vcpu_ioctl(const struct file *file, unsigned long request, uintptr_t argument)
{
    struct vcpu *vcpu = vcpu_known(file->id);
    if (request == KVM_RUN)
        return vcpu_run(file, argument);
    if (request == KVM_SET_SIGNAL_MASK)
        return -vcpu_mask_set(file->id, (const void *)argument);
    long result = request == KVM_GET_REGS ? vcpu_get_regs(file, (void *)argument) : 1;
    if (result != 1)
        return result;
    if (!vcpu)
        return file_call(file, request, argument);
    kernel_sigset old = signals_block();
    call_finish_waiting(thread_self());
    vcpu_lock(vcpu);
    result = file_call(file, request, argument);
    vcpu_unlock(vcpu);
    signals_restore(old);
    return result;
}

static long file_ioctl(const struct file *file, unsigned long request, uintptr_t argument)
{
    unsigned type = request >> 8 & 0xff;
    if (file->kind == KIND_GMEM && type != TYPE_KVM && type != TYPE_GMEM)
        return -ENOTTY;
    if ((file->kind == KIND_VM || file->kind == KIND_VCPU) && file->maker != process.client)
        return -EIO;
    if (file->kind == KIND_VCPU)
        return vcpu_ioctl(file, request, argument);
    return file_call(file, request, argument);
}

/* The client's own userfaultfd: a guest_memfd's mapping cannot be registered with one. */
static bool is_register_of_gmem(unsigned long request, uintptr_t argument)
{
    struct uffdio_register range;
    return request == UFFDIO_REGISTER && areas_exist() &&
           !copy_from_client(&range, (const void *)argument, sizeof(range)) &&
           areas_touch((const void *)(uintptr_t)range.range.start, range.range.len, AREA_GMEM);
}

long call_ioctl_any(int fd, unsigned long request, uintptr_t argument)
{
    struct file file;
    if (!process.active)
        return sys(SYS_ioctl, fd, request, argument);
    if (could_be_for_us(fd, request) && !is_for_any_file(request) && file_of(fd, &file) != KIND_NONE)
        return file_ioctl(&file, (uint32_t)request, argument);
    if (is_register_of_gmem(request, argument))
        return -EINVAL;
    return sys(SYS_ioctl, fd, request, argument);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    uintptr_t argument = va_arg(arguments, uintptr_t);
    va_end(arguments);
    return (int)libc_result(call_ioctl_any(fd, request, argument));
}
