/*
 * Devices of an SNP guest: one that the guest trusts works on private memory, its ring of descriptors included, which was
 * part of the image; any other finds nothing there. What is in the ring then only the guest can say.
 */
#define _GNU_SOURCE
#include "../../examples/clients/iommu.h"

#include "snp.h"

enum { PAGES = 2, SIZE = PAGES * PAGE, RING_GPA = DATA_GPA + PAGE, FILLED = 77 };
#define BASE (1ull << 30)
#define RING (BASE + PAGE)

/* A device on an address space, by a page table of its own if it is a trusted one; its descriptor. */
static int plug(int iommu, const char *path, uint32_t ioas, bool trusted) {
    int device = open(path, O_RDWR);
    struct vfio_bind bind = {.argsz = sizeof(bind), .iommufd = iommu};
    if (device < 0 || ioctl(device, VFIO_BIND, &bind)) return -1;
    struct iommu_hwpt_alloc_ hwpt = {
        .size = sizeof(hwpt), .flags = GUESTMEM_HWPT_TRUSTED, .dev_id = bind.out_devid, .pt_id = ioas};
    if (trusted && ioctl(iommu, IOMMU_HWPT_ALLOC_, &hwpt)) return -1;
    struct vfio_attach attach = {.argsz = sizeof(attach), .pt_id = trusted ? hwpt.out_hwpt_id : ioas};
    return ioctl(device, VFIO_ATTACH, &attach) ? -1 : device;
}

/* How many of the first descriptors have a status now. */
static int doorbell(int device, uint32_t count) {
    struct dma_doorbell bell = {.argsz = sizeof(bell), .ring = RING, .entries = 2, .count = count};
    return ioctl(device, GUESTMEM_DMA_DOORBELL, &bell) ? -1 : (int)bell.done;
}

/* Whether the guest finds this byte at a private address. */
static bool finds(struct guest *g, uint64_t gpa, int byte) {
    return told(g, touch(g, PRIVATE_VIEW + gpa)) == byte;
}

static void devices_of_a_guest(void) {
    struct dma_descriptor ring[] = {
        {.operation = DMA_FILL, .target = BASE, .length = 1, .pattern = FILLED},
        {.operation = DMA_COPY, .source = BASE, .target = RING + 2048, .length = 1},
    };
    struct guest g;

    STEP(open_launch(&g, guest_count, guest_count_end));
    memcpy(g.m.low + RING_GPA, ring, sizeof(ring));
    STEP(finish_launch(&g));
    uint8_t *memory = g.m.low + DATA_GPA;

    int iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
    struct iommu_ioas_alloc_ alloc = {.size = sizeof(alloc)};
    CHECK(!ioctl(iommu, IOMMU_IOAS_ALLOC_, &alloc), "errno %d", errno);
    struct iommu_ioas_map_file_ map = {.size = sizeof(map),
        .flags = IOAS_FIXED_IOVA | IOAS_READABLE | IOAS_WRITEABLE | GUESTMEM_IOAS_FOLLOW,
        .ioas_id = alloc.out_ioas_id, .fd = g.gmem, .start = DATA_GPA, .length = SIZE, .iova = BASE};
    CHECK(!ioctl(iommu, IOMMU_IOAS_MAP_FILE_, &map), "errno %d", errno);
    int own = plug(iommu, "/dev/vfio/devices/vfio0", alloc.out_ioas_id, true);
    int stranger = plug(iommu, "/dev/vfio/devices/vfio1", alloc.out_ioas_id, false);
    CHECK(own >= 0 && stranger >= 0, "errno %d", errno);

    CHECK(doorbell(stranger, 1) == 0, "an untrusted device reads a private ring");
    CHECK(doorbell(own, 2) == 2, "errno %d", errno);
    CHECK(finds(&g, DATA_GPA, FILLED), "exit %u", g.m.run->exit_reason);
    CHECK(finds(&g, RING_GPA + 2048, FILLED), "exit %u", g.m.run->exit_reason);
    CHECK(finds(&g, RING_GPA + 4, DMA_DONE), "exit %u", g.m.run->exit_reason);
    CHECK(!convert(g.gmem, DATA_GPA, PAGE, false), "errno %d", errno); /* no device stands in the way */
    CHECK(memory[0] != FILLED + 1 || memory[1] || memory[2], "plaintext");
    CHECK(doorbell(own, 1) == 1, "errno %d", errno); /* to a page that is shared now */
    CHECK(finds(&g, RING_GPA + 4, DMA_FAULT), "exit %u", g.m.run->exit_reason);
    close(stranger), close(own), close(iommu);
    close_guest(&g);
}

int main(void) {
    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> SNP_VM & 1)) skip_all("no SNP");
    begin_case();
    devices_of_a_guest();
    end_case("", "devices of a guest");
    return finish();
}
