/* A process with several threads, one of which, not the first, calls exec. The new program has the old one's /dev/kvm. */
#define _GNU_SOURCE
#include "client.h"

#include <pthread.h>

static char number[16], *arguments[] = {"exec", number, NULL};

static void *sleep_on(void *unused) {
    (void)unused;
    for (;;) pause();
    return NULL;
}

static void *call_exec(void *unused) {
    (void)unused;
    execv("/proc/self/exe", arguments);
    _exit(1);
}

int main(int count, char **values) {
    pthread_t threads[3];

    if (count > 1) return ioctl(atoi(values[1]), KVM_GET_API_VERSION, 0) == KVM_API_VERSION ? 0 : 1;
    int kvm = open("/dev/kvm", O_RDWR);
    if (kvm < 0) skip_all("no /dev/kvm");
    snprintf(number, sizeof(number), "%d", kvm);
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, sleep_on, NULL);
    pthread_create(&threads[2], NULL, call_exec, NULL);
    sleep_on(NULL);
    return 1;
}
