/* A device does DMA on a guest_memfd while another thread converts its pages.
 *
 * The file is mapped for DMA once, and nothing is unmapped because of a conversion. Every DMA moves exactly the bytes that
 * the page has, or faults and moves none; and no conversion is ever refused because of them.
 *
 *     gcc -pthread -o dma dma.c && guestmem run -- ./dma [conversions [device]]
 *
 * Device 0 has its engine in the server, device 4 in a process of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "iommu.h"

enum { PAGE = 4096, PAGES = 16, VM_SW_PROTECTED = 1 };

#define MEMORY (1ull << 30)  /* IOVA of the guest_memfd */
#define BUFFERS (2ull << 30) /* IOVA of our own memory: a ring, then for each page what is read and what is written */

struct create_guest_memfd {
    uint64_t size, flags, reserved[6];
};
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct create_guest_memfd)
enum { GMEM_MMAP = 1, GMEM_INIT_SHARED = 2 };

struct memory_attributes2 {
    uint64_t offset, size, attributes, flags, error_offset, reserved[11];
};
#define SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, struct memory_attributes2)
enum { PRIVATE = 1 << 3 };

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int must(int result, const char *what)
{
    if (result < 0)
        die(what);
    return result;
}

/* ---- the other thread */

static int gmem;
static long conversions, refused;
static atomic_bool converted;

static void convert(uint64_t page, uint64_t pages, uint64_t attributes)
{
    struct memory_attributes2 range = {.offset = page * PAGE, .size = pages * PAGE, .attributes = attributes};
    if (ioctl(gmem, SET_MEMORY_ATTRIBUTES2, &range))
        refused++;
}

static void *convert_pages(void *unused)
{
    unsigned seed = 1;
    for (long done = 0; done < conversions; done++)
        convert(rand_r(&seed) % PAGES, 1, done % 3 ? (rand_r(&seed) & 1) * PRIVATE : (done / 3 & 1) * PRIVATE);
    atomic_store(&converted, true);
    return unused;
}

/* ---- the device */

struct buffers {
    struct dma_descriptor ring[PAGES];
    char fill[PAGE - PAGES * sizeof(struct dma_descriptor)];
    char from[PAGES][PAGE], to[PAGES][PAGE];
};

static struct buffers *buffers;
static char expected[PAGES][PAGE];
static long moved, faulted;

static int open_device(const char *number, int iommu, uint32_t ioas)
{
    char path[64];
    snprintf(path, sizeof(path), "/dev/vfio/devices/vfio%s", number);
    int device = must(open(path, O_RDWR), path);
    struct vfio_bind bind = {.argsz = sizeof(bind), .iommufd = iommu};
    must(ioctl(device, VFIO_BIND, &bind), "VFIO_DEVICE_BIND_IOMMUFD");
    struct vfio_attach attach = {.argsz = sizeof(attach), .pt_id = ioas};
    must(ioctl(device, VFIO_ATTACH, &attach), "VFIO_DEVICE_ATTACH_IOMMUFD_PT");
    return device;
}

static void work(int device, int count)
{
    struct dma_doorbell bell = {.argsz = sizeof(bell), .ring = BUFFERS, .entries = PAGES, .count = count};
    must(ioctl(device, GUESTMEM_DMA_DOORBELL, &bell), "doorbell");
    if (bell.done != (uint32_t)count) {
        fprintf(stderr, "the ring itself cannot be reached\n");
        exit(1);
    }
}

static uint64_t iova_of(const void *place)
{
    return BUFFERS + ((const char *)place - (const char *)buffers);
}

static void wrong(int page, const char *what)
{
    fprintf(stderr, "page %d: %s\n", page, what);
    exit(1);
}

static bool has_moved(int page)
{
    const struct dma_descriptor *done = &buffers->ring[page];
    if (done->status == DMA_DONE) {
        moved++;
        return true;
    }
    if (done->status != DMA_FAULT)
        wrong(page, "neither done nor faulted");
    if (done->fault != MEMORY + (uint64_t)page * PAGE)
        wrong(page, "it faulted somewhere else");
    faulted++;
    return false;
}

/* The device reads every page: what comes is what the page has, or nothing. */
static void read_all(int device)
{
    static char untouched[PAGE];
    memset(untouched, 0x55, PAGE);
    memset(buffers->from, 0x55, sizeof(buffers->from));
    for (int page = 0; page < PAGES; page++)
        buffers->ring[page] = (struct dma_descriptor){
            .operation = DMA_COPY, .source = MEMORY + page * PAGE, .target = iova_of(buffers->from[page]), .length = PAGE};
    work(device, PAGES);
    for (int page = 0; page < PAGES; page++) {
        bool came = has_moved(page);
        if (memcmp(buffers->from[page], came ? expected[page] : untouched, PAGE))
            wrong(page, came ? "the wrong bytes came" : "a DMA that faulted moved something");
    }
}

/* The device writes every page; which of them it reached is seen by later reads, and at the end. */
static void write_all(int device, long round)
{
    for (int page = 0; page < PAGES; page++) {
        memset(buffers->to[page], (int)(round * 31 + page), PAGE);
        memcpy(buffers->to[page], &round, sizeof(round));
        buffers->ring[page] = (struct dma_descriptor){
            .operation = DMA_COPY, .source = iova_of(buffers->to[page]), .target = MEMORY + page * PAGE, .length = PAGE};
    }
    work(device, PAGES);
    for (int page = 0; page < PAGES; page++)
        if (has_moved(page))
            memcpy(expected[page], buffers->to[page], PAGE);
}

/* ---- */

static int make_memory(void)
{
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, VM_SW_PROTECTED), "KVM_CREATE_VM");
    struct create_guest_memfd create = {.size = PAGES * PAGE, .flags = GMEM_MMAP | GMEM_INIT_SHARED};
    return must(ioctl(vm, CREATE_GUEST_MEMFD, &create), "KVM_CREATE_GUEST_MEMFD");
}

static uint32_t make_address_space(int iommu)
{
    struct iommu_ioas_alloc_ alloc = {.size = sizeof(alloc)};
    must(ioctl(iommu, IOMMU_IOAS_ALLOC_, &alloc), "IOMMU_IOAS_ALLOC");
    struct iommu_ioas_map_file_ file = {.size = sizeof(file),
                                        .flags = IOAS_FIXED_IOVA | IOAS_READABLE | IOAS_WRITEABLE | GUESTMEM_IOAS_FOLLOW,
                                        .ioas_id = alloc.out_ioas_id,
                                        .fd = gmem,
                                        .length = PAGES * PAGE,
                                        .iova = MEMORY};
    must(ioctl(iommu, IOMMU_IOAS_MAP_FILE_, &file), "IOMMU_IOAS_MAP_FILE");
    return alloc.out_ioas_id;
}

/* Our own memory is pinned, as it is today. */
static void map_buffers(int iommu, uint32_t ioas)
{
    struct iommu_ioas_map_ own = {.size = sizeof(own),
                                  .flags = IOAS_FIXED_IOVA | IOAS_READABLE | IOAS_WRITEABLE,
                                  .ioas_id = ioas,
                                  .user_va = (uintptr_t)buffers,
                                  .length = sizeof(*buffers),
                                  .iova = BUFFERS};
    must(ioctl(iommu, IOMMU_IOAS_MAP_, &own), "IOMMU_IOAS_MAP");
}

static void take_down(int device, int iommu, uint32_t ioas)
{
    struct vfio_detach detach = {.argsz = sizeof(detach)};
    must(ioctl(device, VFIO_DETACH, &detach), "VFIO_DEVICE_DETACH_IOMMUFD_PT");
    struct iommu_ioas_unmap_ all = {.size = sizeof(all), .ioas_id = ioas, .length = UINT64_MAX};
    must(ioctl(iommu, IOMMU_IOAS_UNMAP_, &all), "IOMMU_IOAS_UNMAP");
    struct iommu_destroy_ destroy = {.size = sizeof(destroy), .id = ioas};
    must(ioctl(iommu, IOMMU_DESTROY_, &destroy), "IOMMU_DESTROY");
    close(device);
    close(iommu);
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    conversions = argc > 1 ? atol(argv[1]) : 100000;
    gmem = make_memory();
    char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    buffers = mmap(NULL, sizeof(*buffers), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || buffers == MAP_FAILED)
        die("mmap");

    int iommu = must(open("/dev/iommu", O_RDWR), "/dev/iommu");
    uint32_t ioas = make_address_space(iommu);
    map_buffers(iommu, ioas);
    int device = open_device(argc > 2 ? argv[2] : "0", iommu, ioas);

    pthread_t converter;
    double began = seconds();
    pthread_create(&converter, NULL, convert_pages, NULL);
    for (long round = 1; !atomic_load(&converted); round++) {
        write_all(device, round);
        read_all(device);
    }
    pthread_join(converter, NULL);
    double took = seconds() - began;
    take_down(device, iommu, ioas);

    convert(0, PAGES, 0);
    if (memcmp(memory, expected, sizeof(expected)))
        wrong(-1, "at the end the memory is not what was written");
    fprintf(stderr, "%.1f s, %ld DMAs moved, %ld faulted\n", took, moved, faulted);
    printf("%ld conversions, %ld refused; every DMA moved the right bytes or faulted\n", conversions, refused);
    return refused != 0;
}
