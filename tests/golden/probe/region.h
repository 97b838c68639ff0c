/* Shared by the two files of section R. */
#ifndef GOLDEN_REGION_H
#define GOLDEN_REGION_H

#include <stdint.h>

int delete_slot(int vm, uint32_t slot);
int bind_gmem(int vm, uint32_t slot, uint64_t gpa, uint64_t size, int fd, uint64_t offset);

void ask_sequence(void);
void ask_plain_slots(void);
void ask_file_closed(void);
void ask_vm_closed(void);

#endif
