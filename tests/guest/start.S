# Entry points, descriptor tables and interrupt stubs of the guest. 32-bit protected mode, paging off, no FPU.
# The image is flat and linked at 0x100000: a bzImage loader enters at its first byte (ESI = boot_params),
# a PVH loader at 0x100010 (EBX = hvm_start_info).
        .section .head, "ax"
        .code32
        .globl _start
_start: movl    $2, %eax
        jmp     enter
        .org    0x10
pvh_entry:
        movl    %ebx, %esi
        movl    $1, %eax
enter:  cli
        cld
        movl    %eax, %ebp
        lgdt    gdt_pointer
        ljmp    $8, $1f
1:      movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %eax, %ss
        movl    $stack_end, %esp
        movl    $bss_start, %edi        # a bzImage loader, and a reboot, leave rubbish in bss
        movl    $bss_words, %ecx
        xorl    %eax, %eax
        rep stosl
        pushl   %esi
        pushl   %ebp
        call    guest_main
2:      hlt
        jmp     2b

        .globl  irq_stub, trap_stub, sleep_until_irq
sleep_until_irq:
        sti
        hlt
sleep_done:
        cli
        ret
irq_stub:                               # interrupts are on only in the HLT above, so the way back is known;
        movl    $0, 0xfee000b0          # EOI
        addl    $12, %esp               # and IRET is what KVM's emulator lacks in protected mode
        jmp     sleep_done
trap_stub:                              # any exception: the top of the stack is an error code or EIP
        cli
        pushl   4(%esp)
        pushl   4(%esp)
        call    guest_trap

        .balign 8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .section .noinit, "aw", @nobits
        .balign 16
        .skip   8192
stack_end:
