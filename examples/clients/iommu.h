/* /dev/iommu, VFIO and guestmem's DMA engine, for machines whose headers are older. The numbers and layouts are those of
 * linux/iommufd.h and linux/vfio.h; what is guestmem's own is called so. */
#pragma once

#include <linux/ioctl.h>
#include <stdint.h>

#define IOMMU_DESTROY_ _IO(';', 0x80)
struct iommu_destroy_ {
    uint32_t size, id;
};

#define IOMMU_IOAS_ALLOC_ _IO(';', 0x81)
struct iommu_ioas_alloc_ {
    uint32_t size, flags, out_ioas_id;
};

enum { IOAS_FIXED_IOVA = 1, IOAS_WRITEABLE = 2, IOAS_READABLE = 4 };
#define GUESTMEM_IOAS_FOLLOW (1u << 31) /* guestmem's own: see docs/iommu/how-to.md */

#define IOMMU_IOAS_MAP_ _IO(';', 0x85)
struct iommu_ioas_map_ {
    uint32_t size, flags, ioas_id, reserved;
    uint64_t user_va, length, iova;
};

#define IOMMU_IOAS_MAP_FILE_ _IO(';', 0x8f)
struct iommu_ioas_map_file_ {
    uint32_t size, flags, ioas_id;
    int32_t fd;
    uint64_t start, length, iova;
};

#define IOMMU_IOAS_UNMAP_ _IO(';', 0x86)
struct iommu_ioas_unmap_ {
    uint32_t size, ioas_id;
    uint64_t iova, length;
};

#define GUESTMEM_HWPT_TRUSTED (1u << 31) /* guestmem's own: a page table of T=1 */
#define IOMMU_HWPT_ALLOC_ _IO(';', 0x89)
struct iommu_hwpt_alloc_ {
    uint32_t size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len;
    uint64_t data_uptr;
};

#define VFIO_BIND _IO(';', 100 + 18)
struct vfio_bind {
    uint32_t argsz, flags;
    int32_t iommufd;
    uint32_t out_devid;
};

#define VFIO_ATTACH _IO(';', 100 + 19)
struct vfio_attach {
    uint32_t argsz, flags, pt_id;
};

#define VFIO_DETACH _IO(';', 100 + 20)
struct vfio_detach {
    uint32_t argsz, flags;
};

/* guestmem's own: in the place of a doorbell register. Returns when the work is done. */
#define GUESTMEM_DMA_DOORBELL _IO(';', 0xff)
struct dma_doorbell {
    uint32_t argsz, flags;
    uint64_t ring; /* the IOVA of `entries` descriptors */
    uint32_t entries, first, count, done;
};

enum { DMA_COPY = 1, DMA_FILL, DMA_CHECKSUM, DMA_GATHER, DMA_SCATTER };
enum { DMA_PENDING, DMA_DONE, DMA_FAULT, DMA_BAD };

struct dma_descriptor {
    uint32_t operation, status;
    uint64_t source, target, length, pattern;
    uint64_t result; /* bytes moved, or the checksum */
    uint64_t fault;  /* the IOVA at which a DMA faulted */
    uint64_t reserved;
};
