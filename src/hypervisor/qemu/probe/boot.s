# What a stock guest needs of its processor, in one boot sector: real mode, 64-bit mode with paging,
# floating point in vector registers, timer interrupts that wake a halted CPU. Ends QEMU through
# isa-debug-exit at port 0x501: 0x10 all fine, 0x11 wrong arithmetic.
#
#   as --64 boot.s -o boot.o && ld -e 0 -Ttext=0 --oformat binary -m elf_x86_64 boot.o -o boot.bin
.code16
.org 0
start:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $0x7000,%sp
  # page tables at 0x1000..0x3fff: one 2 MiB page, identity
  cld
  movw $0x1000,%di
  movw $0x1800,%cx
  rep stosw
  movw $0x2003,0x1000
  movw $0x3003,0x2000
  movw $0x0083,0x3000
  # timer: channel 0, mode 2, about 1 ms; only IRQ 0 unmasked, vector 0x20
  movb $0x11,%al
  outb %al,$0x20
  movb $0x20,%al
  outb %al,$0x21
  movb $0x04,%al
  outb %al,$0x21
  movb $0x01,%al
  outb %al,$0x21
  movb $0xfe,%al
  outb %al,$0x21
  movb $0x34,%al
  outb %al,$0x43
  movb $0xa9,%al
  outb %al,$0x40
  movb $0x04,%al
  outb %al,$0x40
  lgdt 0x7c00+gdtr
  lidt 0x7c00+idtr
  movl $0x620,%eax        # PAE, OSFXSR, OSXMMEXCPT
  movl %eax,%cr4
  movl $0x1000,%eax
  movl %eax,%cr3
  movl $0xc0000080,%ecx
  rdmsr
  orw $0x100,%ax
  wrmsr
  movl $0x80000011,%eax
  movl %eax,%cr0
  ljmp $8,$0x7c00+long
.code64
long:
  xorl %eax,%eax
  movl %eax,%ds
  movl %eax,%es
  movl %eax,%ss
  # interrupt gate 0x20 at 0x4000+0x200
  movl $0x4200,%edi
  movl $(0x00080000+0x7c00),%eax
  addl $tick,%eax
  movl %eax,(%rdi)
  movl $0x00008e00,4(%rdi)
  movq $0,8(%rdi)
  # vectors: 3+5 in floating point
  movl $3,%eax
  cvtsi2sd %eax,%xmm0
  addsd %xmm0,%xmm0
  cvttsd2si %xmm0,%ebx    # 6
  cmpl $6,%ebx
  jne bad
  xorl %ebp,%ebp
  sti
wait:
  hlt
  cmpl $10,%ebp
  jb wait
  movb $0x10,%al
  jmp done
bad: movb $0x11,%al
done:
  movw $0x501,%dx
  outb %al,%dx
stop: hlt
  jmp stop
tick:
  pushq %rax
  incl %ebp
  movb $0x20,%al
  outb %al,$0x20
  popq %rax
  iretq
.balign 8
gdt:
  .quad 0
  .quad 0x00209a0000000000
gdtr:
  .word 15
  .long 0x7c00+gdt
idtr:
  .word 0x3ff
  .long 0x4000
.org 510
.word 0xaa55
