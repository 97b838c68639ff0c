/* What our files look like to calls on files: rows of sections I, O and K of what Linux 6.18 was seen to answer. */
#include "client.h"

#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>

static int kvm, vm, vcpu, gmem;

static void set_up(void)
{
    kvm = kvm_open();
    vm = ioctl(kvm, CREATE_VM, 0);
    vcpu = ioctl(vm, CREATE_VCPU, 0);
    gmem = gmem_create(vm, 16 * PAGE);
}

static void identity(void)
{
    struct stat status, other;
    struct statx extended;
    struct statfs system;
    set_up();
    CHECK(!fallocate(gmem, FALLOC_FL_KEEP_SIZE, 0, PAGE) && !fstat(gmem, &status));
    CHECK(status.st_mode == (S_IFREG | 0600) && status.st_nlink == 1 && !status.st_blocks);
    CHECK(status.st_size == 16 * (off_t)PAGE && status.st_blksize == 4096);
    CHECK(!fstatat(gmem, "", &other, AT_EMPTY_PATH) && other.st_nlink == 1 && other.st_ino == status.st_ino);
    CHECK(!statx(gmem, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &extended));
    CHECK(extended.stx_mask == 0x17ff && !extended.stx_attributes && !extended.stx_blocks && extended.stx_nlink == 1);
    CHECK(!fstatfs(gmem, &system) && system.f_type == 0x9041934 && system.f_namelen == 255 && system.f_flags == 0x20);
    CHECK(!fstat(kvm, &status) && S_ISCHR(status.st_mode) && !stat("/dev/kvm", &status) && S_ISCHR(status.st_mode));
    CHECK(!fstat(vm, &status) && status.st_mode == 0600 && !access("/dev/kvm", R_OK | W_OK));
}

static void transfer(void)
{
    char byte = 0;
    struct iovec part = {&byte, 1};
    off_t offset = 0;
    int pipes[2], memory = memfd_create("other", 0);
    set_up();
    CHECK(!pipe(pipes) && !ftruncate(memory, PAGE) && write(pipes[1], "x", 1) == 1);
    CHECK_ERRNO(read(gmem, &byte, 1), EINVAL);
    CHECK_ERRNO(read(gmem, &byte, 0), EINVAL);
    CHECK_ERRNO(write(gmem, &byte, 1), EINVAL);
    CHECK_ERRNO(pread(gmem, &byte, 1, 0), ESPIPE);
    CHECK_ERRNO(pwrite(gmem, &byte, 1, 0), ESPIPE);
    CHECK_ERRNO(pread(gmem, &byte, 1, -1), EINVAL);
    CHECK_ERRNO(readv(gmem, &part, 1), EINVAL);
    CHECK_ERRNO(writev(gmem, &part, 1), EINVAL);
    CHECK_ERRNO(preadv(gmem, &part, 1, 0), ESPIPE);
    CHECK_ERRNO(preadv2(gmem, &part, 1, -1, 0), EINVAL);
    CHECK_ERRNO(splice(gmem, NULL, pipes[1], NULL, 1, 0), EINVAL);
    CHECK_ERRNO(splice(pipes[0], NULL, gmem, &offset, 1, 0), EINVAL);
    CHECK_ERRNO(sendfile(memory, gmem, NULL, 1), EINVAL);
    CHECK_ERRNO(sendfile(memory, gmem, &offset, 1), ESPIPE);
    CHECK_ERRNO(sendfile(gmem, memory, NULL, 1), EINVAL);
    CHECK_ERRNO(copy_file_range(gmem, NULL, memory, NULL, 1, 0), EXDEV);
    CHECK_ERRNO(copy_file_range(memory, NULL, gmem, NULL, 1, 0), EXDEV);
    CHECK_ERRNO(read(vm, &byte, 1), EINVAL);
    CHECK_ERRNO(read(vcpu, &byte, 1), EINVAL);
    CHECK_ERRNO(write(kvm, &byte, 1), EINVAL);
    CHECK(pread(memory, &byte, 1, 0) == 1 && read(pipes[0], &byte, 1) == 1 && byte == 'x');
}

static void change(void)
{
    char list[8];
    set_up();
    for (int whence = SEEK_SET; whence <= SEEK_HOLE; whence++)
        CHECK_ERRNO(lseek(gmem, 0, whence), ESPIPE);
    CHECK_ERRNO(lseek(gmem, 0, 99), EINVAL);
    CHECK_ERRNO(ftruncate(gmem, 0), EINVAL);
    CHECK_ERRNO(fsync(gmem), EINVAL);
    CHECK_ERRNO(fdatasync(gmem), EINVAL);
    CHECK_ERRNO(readahead(gmem, 0, PAGE), EINVAL);
    CHECK_ERRNO(fchmod(gmem, 0600), EINVAL);
    CHECK_ERRNO(fchown(gmem, 0, 0), EINVAL);
    CHECK_ERRNO(futimens(gmem, NULL), EINVAL);
    CHECK_ERRNO(fsetxattr(gmem, "user.a", "", 0, 0), EOPNOTSUPP);
    CHECK_ERRNO(fgetxattr(gmem, "user.a", list, 1), EOPNOTSUPP);
    CHECK(flistxattr(gmem, list, sizeof(list)) == 0);
    CHECK(posix_fallocate(gmem, 0, PAGE) == ESPIPE && posix_fallocate(gmem, 0, 0) == EINVAL);
    CHECK_ERRNO(fcntl(gmem, F_ADD_SEALS, F_SEAL_SHRINK), EINVAL);
    CHECK_ERRNO(fcntl(gmem, F_GET_SEALS), EINVAL);
    CHECK_ERRNO(fcntl(gmem, F_SETFL, O_DIRECT), EINVAL);
    CHECK_ERRNO(fcntl(gmem, F_SETLEASE, F_WRLCK), EAGAIN);
    CHECK(!fcntl(gmem, F_SETFL, O_NONBLOCK) && fcntl(gmem, F_GETFL) & O_NONBLOCK);
    CHECK(!flock(gmem, LOCK_EX) && !flock(gmem, LOCK_UN));
}

static void requests(void)
{
    int value = 0;
    set_up();
    CHECK_ERRNO(ioctl(gmem, FIONREAD, &value), ENOTTY);
    CHECK_ERRNO(ioctl(gmem, 0xdeadbeef, &value), ENOTTY);
    CHECK_ERRNO(ioctl(vm, 0xAEFF, &value), ENOTTY);
    CHECK(!ioctl(gmem, _IO(0, 2) /* FIGETBSZ */, &value) && value == 4096);
    CHECK(!ioctl(gmem, FIOCLEX) && fcntl(gmem, F_GETFD) == FD_CLOEXEC);
}

/* Copies are what they are copies of. */
static void copies(void)
{
    set_up();
    int first = dup(gmem), second = fcntl(gmem, F_DUPFD, 100), third = dup2(gmem, 90), fourth = dup3(gmem, 91, O_CLOEXEC);
    int all[] = {first, second, third, fourth};
    for (int i = 0; i < 4; i++) {
        CHECK(all[i] >= 0);
        CHECK_ERRNO(read(all[i], &first, 0), EINVAL);
        CHECK_ERRNO(ftruncate(all[i], 0), EINVAL);
    }
    CHECK(dup2(open("/dev/zero", O_RDONLY), third) == third && read(third, all, 4) == 4);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"identity", identity}, {"transfer", transfer}, {"change", change},
        {"requests", requests}, {"copies", copies},     {NULL, NULL},
    };
    return run_test(tests, argc, argv);
}
