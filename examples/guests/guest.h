/* What a guest of guestmem can call: a debug console, its VMM, and KVM. No C library, no headers of the host. */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

enum { PAGE = 4096 };
enum { CONSOLE_PORT = 0xe9, VMM_PORT = 0x20 };
enum { KVM_HC_MAP_GPA_RANGE = 12, MAP_SHARED = 0, MAP_PRIVATE = 1 << 4 };

static inline void outb(unsigned short port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outl(unsigned short port, u32 value) {
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory");
}
static inline u32 inl(unsigned short port) {
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline void halt(void) { __asm__ volatile("hlt"); }
static inline void pause(void) { __asm__ volatile("pause" ::: "memory"); }

static inline long hypercall3(u64 nr, u64 a0, u64 a1, u64 a2) {
    long ret;
    __asm__ volatile("vmcall" : "=a"(ret) : "a"(nr), "b"(a0), "c"(a1), "d"(a2) : "memory");
    return ret;
}

/* Ask for `pages` pages from `gpa` on to be private or shared. The VMM does it and says whether it could. */
static inline long map_gpa_range(void *gpa, u64 pages, u64 attributes) {
    return hypercall3(KVM_HC_MAP_GPA_RANGE, (u64)gpa, pages, attributes);
}

static inline u64 fetch_add(u64 *where, u64 value) { return __atomic_fetch_add(where, value, __ATOMIC_SEQ_CST); }

static inline void print(const char *text) {
    while (*text) outb(CONSOLE_PORT, (u8)*text++);
}
static inline void print_number(u64 value) {
    char digits[21];
    int place = 20;
    digits[place] = 0;
    do digits[--place] = (char)('0' + value % 10);
    while (value /= 10);
    print(digits + place);
}
