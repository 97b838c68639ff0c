/* What the parts of the shim know of each other. */
#pragma once

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "raw.h"
#include "wire.h"

#define EXPORT __attribute__((visibility("default")))

/* ---- process.c: one program image in one process */

struct process {
    bool active;           /* GUESTMEM_SOCKET was there at start */
    char socket_path[108]; /* its value */
    uint64_t client;       /* the server's number for us, 0 before the first HELLO */
    uint64_t forked_from;  /* our parent's number, if we are a fork of a client */
    uint64_t memfd_device; /* st_dev of every guest_memfd, 0 before the first HELLO */
    uint64_t gmem_magic;   /* f_type of a guest_memfd's file system, 0 for that of anonymous inodes */
    int spins;             /* how often to look for an answer before sleeping; 0 where the server has no other CPU */
    bool guarded;          /* the server has a userfaultfd of ours, or knows that there is none */
};

extern struct process process;

/* False: do nothing of ours. Notices a child that was made by a bare clone(). */
bool shim_active(void);

/* ---- signals.c */

typedef uint64_t kernel_sigset;

/* Everything but the signal by which glibc's setuid() stops all threads and waits for them. */
kernel_sigset signals_block(void);
void signals_restore(kernel_sigset old);
bool signals_pending(kernel_sigset blocked);
int pending_signals_fd(kernel_sigset through); /* readable while one of these is pending */

/* The mask of KVM_SET_SIGNAL_MASK: false if the vCPU has none. */
bool vcpu_mask_get(uint64_t file, kernel_sigset *mask);
int vcpu_mask_set(uint64_t file, const void *argument);

/* ---- channel.c: a connection of one thread */

struct channel {
    int fd;
    unsigned char buffer[WIRE_MAX]; /* the payload last received */
};

struct channel *channel_open(uint32_t hello_flags, int userfaultfd, int *error);
void channel_close(struct channel *channel);

/* A signal handler may run, and call, while its thread waits in a call that signals interrupt; or leave it for good with
 * siglongjmp(). Whoever calls next brings the waiting call to its end and keeps its answer here. */
struct parked {
    uint64_t call; /* which call, 0 none */
    struct wire_answer answer;
};

struct thread {
    struct channel *channel;
    uint64_t calls;   /* numbers them */
    uint64_t waiting; /* the call that can be interrupted now, 0 none */
    struct parked parked;
    int signal_fd; /* of signals that end KVM_RUN and stay pending */
    bool signal_fd_open;
    kernel_sigset signal_fd_set;
    struct vcpu *running;  /* the vCPU whose KVM_RUN waits for the server */
    kernel_sigset ends_by; /* signals that end that run */
    bool cancelling;       /* the call was told to end: no guest is entered any more */
};

struct thread *thread_self(void);
int thread_channel(struct thread *self); /* opens it if need be; errno */
void thread_keep_channel(struct channel *channel); /* until the thread ends */
void channels_lock(void);
void channels_unlock(void);
void channels_after_fork(void); /* in the child: it has none */

void descriptor_hide(int fd);
void descriptor_unhide(int fd);
bool descriptor_hidden(int fd);
int descriptor_next_hidden(int from); /* the first hidden one not below `from`, or -1 */
int descriptor_move_high(int fd); /* closes the low one */

/* ---- call.c: calls over a channel */

enum wait { WAIT_WHOLE, WAIT_SIGNALS };

struct call {
    struct wire_request request;
    const void *payload; /* the client's memory: may be no memory at all */
    size_t payload_length;
    int send_fd; /* a descriptor to send along if with_fd */
    bool with_fd;
    void *reply; /* the client's memory, for the answer's payload */
    enum wait wait;
    kernel_sigset run_mask; /* WAIT_SIGNALS: blocked beside the thread's own mask */
    int signal_fd;          /* WAIT_SIGNALS: readable if a signal came that stays pending, if with_signal_fd */
    bool with_signal_fd;
    /* the result */
    struct wire_answer answer;
    int fd; /* received, or -1 */
};

/* 0 or an errno: the answer's, EFAULT of the payloads, EMFILE, or EIO without a server. */
int call_server(struct call *call);
int call_blocked(struct call *call, kernel_sigset thread_mask); /* signals are blocked already, the mask was this */
/* A call of four words. */
int call_words(enum wire_op op, uint64_t file, uint64_t a, uint64_t b, uint64_t c, uint64_t d);
/* One exchange, signals blocked, upcalls done. For channel.c. */
int call_on_channel(struct channel *channel, struct call *call);
void call_finish_waiting(struct thread *self);

ssize_t wire_send(int fd, const struct wire_request *request, const void *payload, size_t length, int send_fd,
                  bool with_fd);

struct message {
    struct wire_answer head;
    size_t length; /* of the payload */
    int fds[WIRE_FDS];
    int fd_count;
    bool fds_lost;
};
int wire_receive(struct channel *channel, struct message *message, int flags);

/* ---- copy.c */

int copy_to_client(void *to, const void *from, size_t length);
int copy_from_client(void *to, const void *from, size_t length);

/* ---- files.c */

enum kind { KIND_NONE, KIND_KVM, KIND_VM, KIND_VCPU, KIND_GMEM, KIND_GUP_TEST, KIND_IOMMU, KIND_VFIO, KIND_LIVE_UPDATE, KIND_SESSION };

struct file {
    uint64_t id; /* st_ino, and the number of the view above it */
    enum kind kind;
    uint64_t maker; /* the client that made it */
};

void file_mark(int fd);                        /* this number may be one of ours */
bool file_marked(int fd);                      /* never said of most descriptors: costs one load */
int file_next_marked(int from);                /* the first not below `from`, or -1 */
enum kind file_of(int fd, struct file *file);  /* asks fstat, the cache, and at last the server */
enum kind file_of_marked(int fd, struct file *file);
uint64_t file_number(int fd, const struct stat *status);
enum kind file_of_stat(const struct stat *status, struct file *file, bool ask);
void file_made(int fd, enum kind kind);
void files_mark_inherited(void);
void files_sync(void);

/* ---- areas.c: ranges of this process that the server must hear about */

enum area_kind { AREA_GMEM = 1, AREA_BOUND = 2, AREA_ANY = 3 };

bool areas_touch(const void *address, size_t length, enum area_kind kinds);
void areas_add(const void *address, size_t length, enum area_kind kind);
void areas_remove(const void *address, size_t length, enum area_kind kinds);
bool areas_exist(void);
void areas_lock(void);
void areas_unlock(void);
void areas_after_fork(void); /* in the child */

/* ---- guard.c */

int userfaultfd_open(uint64_t features); /* or -errno */
int guard_prepare(void);                 /* before the first mapping of a guest_memfd; errno */
void guard_child(void);                  /* in a child that has mappings */
void guard_lock(void);
void guard_unlock(void);
void guard_after_fork(void);

/* ---- upcalls.c */

struct range {
    uint64_t address, length;
};

int upcall_do(struct channel *channel, struct message *message); /* and answer it; errno if the channel broke */
int zap_ranges(const unsigned char *ranges, size_t length);
