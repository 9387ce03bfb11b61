/* A 1 GiB window at 0x40000000 to RAM above 4 GiB: long mode's page tables (2 MiB pages), 32-bit code in compatibility
   mode. Paging is on only while the window is looked through, since walking tables makes an emulated guest slow. Why long
   mode: KVM over PVM refuses CR0.PG without it. Not for anything but filling and checking. */
#include "guest.h"

enum { WINDOW = 0x40000000 };
static u64 tables[4][512] __attribute__((aligned(4096)));

static void paging(u32 bit) {
    u32 cr0, wanted;
    __asm__ volatile("movl %%cr0, %0" : "=r"(cr0));
    wanted = (cr0 & 0x7fffffff) | bit << 31;
    if (wanted != cr0)
        __asm__ volatile("movl %0, %%cr0; jmp 1f; 1:" : : "r"(wanted) : "memory");
}

/* Returns where gpa is to be seen, up to the end of its GiB: below 4 GiB where it is, else in the window. */
u32 window_open(u64 gpa) {
    static u64 shown;
    u64 start = gpa & ~0x3fffffffull;
    if (gpa < 1ull << 32)
        return (u32)gpa;
    for (u32 i = 0; start != shown && i < 512; i++) {
        tables[2][i] = (u64)i << 21 | 0x83; /* the first GiB, where the guest's own code is */
        tables[3][i] = (start + ((u64)i << 21)) | 0x83;
    }
    shown = start;
    tables[0][0] = (u32)tables[1] | 3;
    tables[1][0] = (u32)tables[2] | 3;
    tables[1][1] = (u32)tables[3] | 3;
    __asm__ volatile("movl %%cr4, %%eax; orl $0x20, %%eax; movl %%eax, %%cr4; movl %0, %%cr3;"
                     "movl $0xc0000080, %%ecx; rdmsr; orl $0x100, %%eax; wrmsr"
                     : : "r"(tables) : "eax", "ecx", "edx", "memory");
    paging(1);
    return WINDOW + ((u32)gpa & 0x3fffffff);
}

void window_close(void) { paging(0); }
