/* /dev/iommu and a device, from a client: each call of both, what it writes back, and what a device then reaches. */
#define _GNU_SOURCE
#include "../../examples/clients/iommu.h"

#include "client.h"

#define HOLDS(condition) CHECK(condition, "errno %d", errno)
#define RUN(function)                                                                                                  \
    do {                                                                                                               \
        begin_case();                                                                                                  \
        function();                                                                                                    \
        end_case("", #function);                                                                                       \
    } while (0)

#define BASE (1ull << 30)
enum { RW = IOAS_FIXED_IOVA | IOAS_READABLE | IOAS_WRITEABLE };

struct iommu_range {
    uint64_t start, last;
};
struct iommu_ranges {
    uint32_t size, ioas_id, num_iovas, reserved;
    uint64_t allowed_iovas, out_iova_alignment;
};
#define IOVA_RANGES _IO(';', 0x84)
#define ALLOW_IOVAS _IO(';', 0x82)
struct iommu_copy {
    uint32_t size, flags, dst_ioas_id, src_ioas_id;
    uint64_t length, dst_iova, src_iova;
};
#define IOAS_COPY _IO(';', 0x83)
struct iommu_option_ {
    uint32_t size, option_id;
    uint16_t op, reserved;
    uint32_t object_id;
    uint64_t val64;
};
#define OPTION _IO(';', 0x87)
struct device_info {
    uint32_t argsz, flags, num_regions, num_irqs;
};
#define GET_INFO _IO(';', 100 + 7)

static int iommu, device, gmem;
static uint32_t ioas, device_id;
static const char *device_number = "0";

/* The ring is the last page of what is mapped at BASE. */
static struct dma_descriptor *ring;
#define RING (BASE + 15 * PAGE)

static int open_number(const char *number)
{
    char path[64];
    snprintf(path, sizeof(path), "/dev/vfio/devices/vfio%s", number);
    return open(path, O_RDWR);
}

static int map_own(uint64_t iova, void *memory, uint64_t length)
{
    struct iommu_ioas_map_ map = {.size = sizeof(map),
                                  .flags = RW,
                                  .ioas_id = ioas,
                                  .user_va = (uintptr_t)memory,
                                  .length = length,
                                  .iova = iova};
    return ioctl(iommu, IOMMU_IOAS_MAP_, &map);
}

static int map_file(uint64_t iova, int fd, uint64_t start, uint64_t length, uint32_t flags)
{
    struct iommu_ioas_map_file_ map = {.size = sizeof(map),
                                       .flags = RW | flags,
                                       .ioas_id = ioas,
                                       .fd = fd,
                                       .start = start,
                                       .length = length,
                                       .iova = iova};
    return ioctl(iommu, IOMMU_IOAS_MAP_FILE_, &map);
}

static int64_t unmap(uint64_t iova, uint64_t length)
{
    struct iommu_ioas_unmap_ range = {.size = sizeof(range), .ioas_id = ioas, .iova = iova, .length = length};
    return ioctl(iommu, IOMMU_IOAS_UNMAP_, &range) ? -errno : (int64_t)range.length;
}

static int convert(uint64_t page, uint64_t attributes)
{
    struct kvm_memory_attributes2 range = {.offset = page * PAGE, .size = PAGE, .attributes = attributes};
    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &range);
}

/* One descriptor; its status, or -1 if the ring cannot be reached. */
static int dma(uint32_t operation, uint64_t source, uint64_t target, uint64_t length, uint64_t pattern)
{
    *ring = (struct dma_descriptor){
        .operation = operation, .source = source, .target = target, .length = length, .pattern = pattern};
    struct dma_doorbell bell = {.argsz = sizeof(bell), .ring = RING, .entries = 1, .count = 1};
    if (ioctl(device, GUESTMEM_DMA_DOORBELL, &bell) || bell.done != 1)
        return -1;
    return (int)ring->status;
}

static void the_sequence(void)
{
    iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
    device = open_number(device_number);
    HOLDS(iommu >= 0 && device >= 0);
    HOLDS(access("/dev/iommu", R_OK | W_OK) == 0);
    struct iommu_ioas_alloc_ alloc = {.size = sizeof(alloc)};
    HOLDS(ioctl(iommu, IOMMU_IOAS_ALLOC_, &alloc) == 0);
    ioas = alloc.out_ioas_id;
    struct vfio_attach attach = {.argsz = sizeof(attach), .pt_id = ioas};
    HOLDS(ioctl(device, VFIO_ATTACH, &attach) == -1 && errno == EINVAL);
    struct vfio_bind bind = {.argsz = sizeof(bind), .iommufd = device};
    HOLDS(ioctl(device, VFIO_BIND, &bind) == -1 && errno == EBADFD);
    bind.iommufd = 999;
    HOLDS(ioctl(device, VFIO_BIND, &bind) == -1 && errno == EBADF);
    bind.iommufd = iommu;
    HOLDS(ioctl(device, VFIO_BIND, &bind) == 0);
    device_id = bind.out_devid;
    HOLDS(ioctl(device, VFIO_ATTACH, &attach) == 0 && attach.pt_id != ioas);
    struct device_info info = {.argsz = sizeof(info)};
    HOLDS(ioctl(device, GET_INFO, &info) == 0 && info.flags == 1 && info.num_regions == 0);
    struct iommu_destroy_ destroy = {.size = sizeof(destroy), .id = ioas};
    HOLDS(ioctl(iommu, IOMMU_DESTROY_, &destroy) == -1 && errno == EBUSY);
    char byte;
    HOLDS(read(iommu, &byte, 1) == -1 && read(device, &byte, 1) == -1);
    HOLDS(ioctl(iommu, _IO(';', 0xfe), &destroy) == -1 && errno == ENOTTY);
    HOLDS(ioctl(iommu, IOMMU_DESTROY_, NULL) == -1 && errno == EFAULT);
    destroy.size = 4;
    HOLDS(ioctl(iommu, IOMMU_DESTROY_, &destroy) == -1 && errno == EINVAL);
}

static void ranges_and_options(void)
{
    struct iommu_range found[2];
    struct iommu_ranges ranges = {
        .size = sizeof(ranges), .ioas_id = ioas, .num_iovas = 1, .allowed_iovas = (uintptr_t)found};
    HOLDS(ioctl(iommu, IOVA_RANGES, &ranges) == -1 && errno == EMSGSIZE);
    HOLDS(ranges.num_iovas == 2 && ranges.out_iova_alignment == PAGE);
    HOLDS(ioctl(iommu, IOVA_RANGES, &ranges) == 0 && found[0].start == 0 && found[1].last == (1ull << 48) - 1);
    struct iommu_range allowed = {2 * BASE, 3 * BASE - 1};
    ranges = (struct iommu_ranges){
        .size = 24, .ioas_id = ioas, .num_iovas = 1, .allowed_iovas = (uintptr_t)&allowed};
    HOLDS(ioctl(iommu, ALLOW_IOVAS, &ranges) == 0);
    struct iommu_option_ option = {.size = sizeof(option), .option_id = 1, .op = 1, .object_id = ioas};
    HOLDS(ioctl(iommu, OPTION, &option) == 0 && option.val64 == 1);
}

static void own_memory(void)
{
    char *memory = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ring = (struct dma_descriptor *)(memory + 15 * PAGE);
    strcpy(memory + 3 * PAGE, "here before it was mapped");
    HOLDS(map_own(BASE, memory, 16 * PAGE) == 0);
    HOLDS(map_own(BASE, memory, PAGE) == -1 && errno == EEXIST);
    HOLDS(dma(DMA_COPY, BASE + 3 * PAGE, BASE, 26, 0) == DMA_DONE && ring->result == 26);
    HOLDS(!strcmp(memory, "here before it was mapped"));
    HOLDS(dma(DMA_FILL, 0, BASE + PAGE - 1, 2, 'x') == DMA_DONE);
    HOLDS(memory[PAGE - 1] == 'x' && memory[PAGE] == 'x' && !memory[PAGE + 1]);
    HOLDS(dma(DMA_CHECKSUM, BASE, 0, 4, 0) == DMA_DONE && ring->result);
    HOLDS(dma(99, 0, 0, 0, 0) == DMA_BAD);
    HOLDS(dma(DMA_COPY, BASE, 5 * BASE, 1, 0) == DMA_FAULT && ring->fault == 5 * BASE);
    HOLDS(unmap(BASE, PAGE) == -ENOENT);
    HOLDS(map_own(4 * BASE, NULL, PAGE) == -1 && errno == EFAULT);
}

static void a_memfd(void)
{
    int fd = memfd_create("memory", 0);
    HOLDS(ftruncate(fd, 4 * PAGE) == 0);
    char *memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    HOLDS(map_file(2 * BASE, fd, 0, 5 * PAGE, 0) == -1 && errno == EINVAL);
    HOLDS(map_file(2 * BASE, fd, 0, PAGE, GUESTMEM_IOAS_FOLLOW) == -1 && errno == EOPNOTSUPP);
    HOLDS(map_file(2 * BASE, iommu, 0, PAGE, 0) == -1 && errno == EINVAL);
    HOLDS(map_file(2 * BASE, 999, 0, PAGE, 0) == -1 && errno == EBADF);
    HOLDS(map_file(2 * BASE, fd, PAGE, 2 * PAGE, 0) == 0);
    HOLDS(dma(DMA_FILL, 0, 2 * BASE, 2, 'm') == DMA_DONE && memory[PAGE] == 'm' && !memory[0]);
    struct iommu_copy copy = {
        .size = sizeof(copy), .flags = IOAS_READABLE, .dst_ioas_id = ioas, .src_ioas_id = ioas, .length = PAGE,
        .src_iova = 2 * BASE};
    HOLDS(ioctl(iommu, IOAS_COPY, &copy) == 0 && copy.dst_iova > 2 * BASE && copy.dst_iova < 3 * BASE);
    HOLDS(unmap(2 * BASE, 2 * PAGE) == 2 * PAGE);
    HOLDS(dma(DMA_COPY, copy.dst_iova, BASE, 1, 0) == DMA_DONE);
    HOLDS(dma(DMA_COPY, BASE, copy.dst_iova, 1, 0) == DMA_FAULT);
    HOLDS(unmap(copy.dst_iova, PAGE) == PAGE);
    HOLDS(map_file(2 * BASE, fd, 0, 4 * PAGE, 0) == 0);
    HOLDS(ftruncate(fd, PAGE) == 0); /* a pin keeps the page, which nobody else sees any more */
    HOLDS(dma(DMA_FILL, 0, 2 * BASE, 4 * PAGE, 't') == DMA_DONE && memory[PAGE - 1] == 't');
    HOLDS(unmap(2 * BASE, 4 * PAGE) == 4 * PAGE);
    close(fd);
}

static void make_gmem(void)
{
    int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
    struct kvm_create_guest_memfd create = {
        .size = 8 * PAGE, .flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED};
    gmem = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create);
    close(kvm);
    close(vm);
}

static void a_guest_memfd(void)
{
    make_gmem();
    HOLDS(gmem >= 0);
    char *memory = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    memory[PAGE] = 'g';
    HOLDS(convert(3, KVM_MEMORY_ATTRIBUTE_PRIVATE) == 0);
    HOLDS(map_file(4 * BASE, gmem, 0, 8 * PAGE, 0) == -1 && errno == EFAULT);
    HOLDS(map_file(4 * BASE, gmem, 0, 9 * PAGE, 0) == -1 && errno == EINVAL);
    HOLDS(map_file(4 * BASE, gmem, 0, 8 * PAGE, GUESTMEM_IOAS_FOLLOW) == 0);
    HOLDS(dma(DMA_COPY, 4 * BASE + PAGE, BASE, 1, 0) == DMA_DONE && *((char *)ring - 15 * PAGE) == 'g');
    HOLDS(dma(DMA_COPY, 4 * BASE + 3 * PAGE, BASE, 1, 0) == DMA_FAULT);
    HOLDS(convert(3, 0) == 0 && convert(1, KVM_MEMORY_ATTRIBUTE_PRIVATE) == 0);
    HOLDS(dma(DMA_FILL, 0, 4 * BASE + 3 * PAGE, 1, 'd') == DMA_DONE && memory[3 * PAGE] == 'd');
    HOLDS(dma(DMA_COPY, 4 * BASE + PAGE, BASE, 1, 0) == DMA_FAULT);
    HOLDS(fallocate(gmem, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 3 * PAGE, PAGE) == 0);
    HOLDS(dma(DMA_COPY, 4 * BASE + 3 * PAGE, BASE, 1, 0) == DMA_DONE && !*((char *)ring - 15 * PAGE));
    HOLDS(unmap(4 * BASE + PAGE, PAGE) == PAGE);
    HOLDS(convert(1, 0) == 0);
    HOLDS(dma(DMA_COPY, 4 * BASE + PAGE, BASE, 1, 0) == DMA_FAULT);
    HOLDS(unmap(4 * BASE, 8 * PAGE) == 7 * PAGE);
    munmap(memory, 8 * PAGE);
}

/* Through its mapping it is pinned, as any memory is. */
static void a_pinned_guest_memfd(void)
{
    char *memory = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    HOLDS(map_own(4 * BASE, memory + PAGE, PAGE) == 0);
    HOLDS(convert(1, KVM_MEMORY_ATTRIBUTE_PRIVATE) == -1 && errno == EAGAIN);
    HOLDS(dma(DMA_FILL, 0, 4 * BASE, 1, 'p') == DMA_DONE && memory[PAGE] == 'p');
    HOLDS(unmap(4 * BASE, PAGE) == PAGE);
    HOLDS(convert(1, KVM_MEMORY_ATTRIBUTE_PRIVATE) == 0);
    HOLDS(map_own(4 * BASE, memory + PAGE, PAGE) == -1 && errno == EFAULT);
    munmap(memory, 8 * PAGE);
}

static void the_memory_ends(void)
{
    HOLDS(map_file(4 * BASE, gmem, 0, 8 * PAGE, GUESTMEM_IOAS_FOLLOW) == 0);
    close(gmem);
    HOLDS(dma(DMA_FILL, 0, 4 * BASE, 1, 'x') == DMA_FAULT);
    HOLDS(unmap(4 * BASE, 8 * PAGE) == 8 * PAGE);
}

static void a_trusted_page_table(void)
{
    make_gmem();
    HOLDS(map_file(4 * BASE, gmem, 0, 8 * PAGE, GUESTMEM_IOAS_FOLLOW) == 0);
    struct iommu_hwpt_alloc_ hwpt = {
        .size = sizeof(hwpt), .flags = GUESTMEM_HWPT_TRUSTED, .dev_id = device_id, .pt_id = ioas};
    HOLDS(ioctl(iommu, IOMMU_HWPT_ALLOC_, &hwpt) == 0);
    struct vfio_attach attach = {.argsz = sizeof(attach), .pt_id = hwpt.out_hwpt_id};
    HOLDS(ioctl(device, VFIO_ATTACH, &attach) == 0);
    HOLDS(dma(DMA_FILL, 0, BASE, 1, 'x') == -1); /* our memory is shared: its ring is out of reach */
    struct vfio_detach detach = {.argsz = sizeof(detach)};
    HOLDS(ioctl(device, VFIO_DETACH, &detach) == 0 && ioctl(device, VFIO_DETACH, &detach) == 0);
    struct iommu_destroy_ destroy = {.size = sizeof(destroy), .id = hwpt.out_hwpt_id};
    HOLDS(ioctl(iommu, IOMMU_DESTROY_, &destroy) == 0);
    destroy.id = ioas;
    HOLDS(ioctl(iommu, IOMMU_DESTROY_, &destroy) == 0);
    close(device);
    close(iommu);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        device_number = argv[1];
    RUN(the_sequence);
    RUN(ranges_and_options);
    RUN(own_memory);
    RUN(a_memfd);
    RUN(a_guest_memfd);
    RUN(a_pinned_guest_memfd);
    RUN(the_memory_ends);
    RUN(a_trusted_page_table);
    return finish();
}
