/*
 * Devices of an SNP guest: one that the guest trusts works on private memory, its ring of descriptors included, which was
 * part of the image; any other finds nothing there. What is in the ring then only the guest can say.
 */
#define _GNU_SOURCE
#include "../../examples/clients/iommu.h"

#include "client.h"

enum { SNP_VM = 4, INIT2 = 22, LAUNCH_START = 100, LAUNCH_UPDATE = 101, LAUNCH_FINISH = 102 };
enum { NORMAL = 1, POLICY_RESERVED = 1 << 17, PAGES = 2, SIZE = PAGES * PAGE, FILLED = 77 };
#define BASE (1ull << 30)
#define RING (BASE + PAGE)

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
    uint64_t policy, gosvw[2], flags_and_padding, pad[4];
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

/* mov al, [rbx]; inc byte [rbx]; out 0x10, al */
static const uint8_t tell_and_count[] = {0x8a, 0x03, 0xfe, 0x03, 0xe6, 0x10};

static int command(int vm, uint32_t id, void *data) {
    struct sev_cmd arguments = {.id = id, .data = (uintptr_t)data};
    return ioctl(vm, MEMORY_ENCRYPT_OP, &arguments);
}

static int convert(int gmem, uint64_t page, uint64_t pages, bool private) {
    struct kvm_memory_attributes2 arguments = {
        .offset = page * PAGE, .size = pages * PAGE, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments);
}

static bool launch(int vm, int gmem) {
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED};
    struct launch_update update = {.gfn_start = DATA_GPA / PAGE, .len = SIZE, .type = NORMAL};
    struct launch_finish end = {0};
    return !convert(gmem, 0, PAGES, true) && !command(vm, INIT2, &init) && !command(vm, LAUNCH_START, &start) &&
           !command(vm, LAUNCH_UPDATE, &update) && !command(vm, LAUNCH_FINISH, &end);
}

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

static void devices_of_a_guest(void) {
    struct machine m;
    uint8_t byte = 0;

    CHECK(!open_machine(&m, SNP_VM, tell_and_count, sizeof(tell_and_count)), "errno %d", errno);
    int gmem = create_gmem(m.vm, SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, SIZE, NULL, gmem), "errno %d", errno);
    uint8_t *memory = map_shared(gmem, SIZE);
    struct dma_descriptor *ring = (void *)(memory + PAGE);
    ring[0] = (struct dma_descriptor){.operation = DMA_FILL, .target = BASE, .length = 1, .pattern = FILLED};
    ring[1] = (struct dma_descriptor){.operation = DMA_COPY, .source = BASE, .target = RING + 2048, .length = 1};
    CHECK(launch(m.vm, gmem), "errno %d", errno);

    int iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
    struct iommu_ioas_alloc_ alloc = {.size = sizeof(alloc)};
    CHECK(!ioctl(iommu, IOMMU_IOAS_ALLOC_, &alloc), "errno %d", errno);
    struct iommu_ioas_map_file_ map = {.size = sizeof(map),
        .flags = IOAS_FIXED_IOVA | IOAS_READABLE | IOAS_WRITEABLE | GUESTMEM_IOAS_FOLLOW,
        .ioas_id = alloc.out_ioas_id, .fd = gmem, .length = SIZE, .iova = BASE};
    CHECK(!ioctl(iommu, IOMMU_IOAS_MAP_FILE_, &map), "errno %d", errno);
    int own = plug(iommu, "/dev/vfio/devices/vfio0", alloc.out_ioas_id, true);
    int stranger = plug(iommu, "/dev/vfio/devices/vfio1", alloc.out_ioas_id, false);
    CHECK(own >= 0 && stranger >= 0, "errno %d", errno);

    CHECK(doorbell(stranger, 1) == 0, "an untrusted device reads a private ring");
    CHECK(doorbell(own, 2) == 2, "errno %d", errno);
    CHECK(run_guest(&m, DATA_GPA, 0, &byte) && byte == FILLED, "exit %u, %u", m.run->exit_reason, byte);
    CHECK(run_guest(&m, DATA_GPA + PAGE + 2048, 0, &byte) && byte == FILLED, "exit %u, %u", m.run->exit_reason, byte);
    CHECK(run_guest(&m, DATA_GPA + PAGE + 4, 0, &byte) && byte == DMA_DONE, "exit %u, %u", m.run->exit_reason, byte);
    CHECK(!convert(gmem, 0, 1, false), "errno %d", errno); /* no device stands in the way */
    CHECK(memory[0] != FILLED + 1 || memory[1] || memory[2], "plaintext");
    CHECK(doorbell(own, 1) == 1, "errno %d", errno); /* to a page that is shared now */
    CHECK(run_guest(&m, DATA_GPA + PAGE + 4, 0, &byte) && byte == DMA_FAULT, "exit %u, %u", m.run->exit_reason, byte);
    close(stranger), close(own), close(iommu);
    munmap(memory, SIZE);
    close(gmem);
    close_machine(&m);
}

int main(void) {
    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> SNP_VM & 1)) skip_all("no SNP");
    begin_case();
    devices_of_a_guest();
    end_case("", "devices of a guest");
    return finish();
}
