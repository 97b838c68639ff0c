/* Prints the rows of the golden table as this kernel (or what stands in for it) answers them.
 * Usage: probe [SECTION | SECTION.GROUP | -SECTION.GROUP]...: these sections (letters of the table) or groups, or all
 * in the table's order; a leading - leaves a group out. */
#include "probe.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { GROUP_SECONDS = 20, ANSWER_LENGTH = 128 };

const char *own_path;

static const struct section *const sections[] = {
    &caps_section, &create_section, &identity_section,  &fileops_section, &wrongfd_section,
    &mmap_section, &touch_section,  &fallocate_section, &share_section,   &vma_section,
    &numa_section, &region_section, &guest_section,
};

/* Rows leave with one write(2) each: a child that dies takes no buffered row with it. */
void row(const char *id, const char *format, ...)
{
    char line[512];
    va_list arguments;
    int length = snprintf(line, sizeof(line), "%s\t", id);
    va_start(arguments, format);
    length += vsnprintf(line + length, sizeof(line) - (size_t)length - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof(line) - 2)
        length = (int)sizeof(line) - 2;
    line[length++] = '\n';
    if (write(STDOUT_FILENO, line, (size_t)length) != length)
        _exit(3);
}

const char *errno_name(int number)
{
    /* The library may say ENOTSUP, which is the same number; the table says EOPNOTSUPP. */
    if (number == EOPNOTSUPP)
        return "EOPNOTSUPP";
    const char *name = strerrorname_np(number);
    return name ? name : "unknown errno";
}

static char *spare(void)
{
    static char buffers[4][ANSWER_LENGTH];
    static unsigned next;
    return buffers[next++ % 4];
}

const char *answer(long result)
{
    if (result == -1)
        return errno_name(errno);
    char *text = spare();
    snprintf(text, ANSWER_LENGTH, "%ld", result);
    return text;
}

const char *answer_fd(int fd)
{
    return fd < 0 ? errno_name(errno) : "fd";
}

void row_ret(const char *id, long result)
{
    row(id, "%s", answer(result));
}

void row_fd(const char *id, int fd)
{
    row(id, "%s", answer_fd(fd));
}

void row_map(const char *id, const void *address)
{
    row(id, "%s", address == MAP_FAILED ? errno_name(errno) : "ok");
}

static sigjmp_buf back;
static volatile sig_atomic_t touching;
static struct touch caught;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)context;
    if (!touching) { /* a crash of the probe or of the shim: die of it, as without a handler */
        struct sigaction plain = {.sa_handler = SIG_DFL};
        sigaction(signal, &plain, NULL);
        return;
    }
    caught = (struct touch){.signal = signal, .code = info->si_code, .address = info->si_addr};
    siglongjmp(back, 1);
}

static void catch_faults(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
}

static struct touch touch_byte(volatile unsigned char *byte, int value)
{
    if (sigsetjmp(back, 1)) {
        touching = 0;
        return caught;
    }
    touching = 1;
    if (value >= 0)
        *byte = (unsigned char)value;
    unsigned seen = *byte;
    touching = 0;
    return (struct touch){.value = seen};
}

struct touch touch_read(const void *address)
{
    return touch_byte((volatile unsigned char *)address, -1);
}

struct touch touch_write(void *address, unsigned char value)
{
    return touch_byte(address, value);
}

const char *touch_text(struct touch touch, const void *map)
{
    char *text = spare();
    if (!touch.signal)
        snprintf(text, ANSWER_LENGTH, "ok, value %u", touch.value);
    else
        snprintf(text, ANSWER_LENGTH, "%s si_code %d si_addr = map+0x%tx",
                 touch.signal == SIGBUS ? "SIGBUS" : "SIGSEGV", touch.code, touch.address - (const char *)map);
    return text;
}

void row_touch(const char *id, struct touch touch, const void *map)
{
    row(id, "%s", touch_text(touch, map));
}

/* The exit status is told with the group's name: 2 = the group could not be set up. */
static void run_group(const struct section *section, const struct group *group)
{
    pid_t child = fork();
    if (child == 0) {
        alarm(GROUP_SECONDS); /* a row that hangs costs its group only */
        catch_faults();
        group->ask();
        _exit(0);
    }
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (child > 0 && status == 0)
        return;
    /* A line that starts with # is no row; the reader of the output shows it with the rows that are missing. */
    printf("# group %s.%s %s %d\n", section->name, group->name, WIFSIGNALED(status) ? "died of signal" : "status",
           WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    fflush(stdout);
}

/* -1: left out; 1: named; 0: not mentioned. */
static int mentioned(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i] + (argv[i][0] == '-'), name) == 0)
            return argv[i][0] == '-' ? -1 : 1;
    return 0;
}

static bool wanted(const struct section *section, const struct group *group, int argc, char **argv)
{
    char name[64];
    bool any = false;
    for (int i = 1; i < argc; i++)
        any |= argv[i][0] != '-';
    snprintf(name, sizeof(name), "%s.%s", section->name, group->name);
    int by_group = mentioned(name, argc, argv);
    return by_group > 0 || (by_group == 0 && (!any || mentioned(section->name, argc, argv) > 0));
}

/* What stands in for the kernel may have a bug that fills the memory: then this program dies of it, and no other. */
static void be_the_victim(void)
{
    int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (score >= 0 && write(score, "1000", 4) != 4)
        perror("oom_score_adj");
    close(score);
}

int main(int argc, char **argv)
{
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    be_the_victim();
    own_path = argv[0];
    if (argc == 3 && strcmp(argv[1], "--after-exec") == 0)
        return after_exec(argv[2]);
    for (size_t s = 0; s < sizeof(sections) / sizeof(sections[0]); s++)
        for (size_t g = 0; g < sections[s]->count; g++)
            if (wanted(sections[s], &sections[s]->groups[g], argc, argv))
                run_group(sections[s], &sections[s]->groups[g]);
    return 0;
}
